// Of mla_decode.cu, the second product: outputs.

// A warp that gathers.
struct Gatherer : Place {
    static constexpr int PIECES = SPAN < 64 ? 1 : SPAN / 64;  // of a span, by scale
    float acc[L / GATHERERS / 8][4];                          // outputs times 2^(BITS · part - 24)
    float zeros[4], total[4];                                 // Σ p∘zero by group, Σ p: of this warp's steps alone

    __device__ inline Gatherer(Place at) : Place(at) {
        for (int j = 0; j < 4; j++) zeros[j] = total[j] = 0;
        for (auto& tile : acc)
            for (float& x : tile) x = 0;
    }

    // Which columns of `acc` are of 16 bytes `chunk` of the span: those of byte y of the g-th two of them.
    __device__ static constexpr int tile_of(int chunk, int y, int part) { return (chunk * 2 + y) * PARTS + part; }
    __device__ inline int channel_of(int chunk, int part) { return part * ROW + warp * SPAN + chunk * 16; }
    __device__ inline int group_of(int chunk, int part) { return channel_of(chunk, part) / 64; }

    __device__ inline void rescale(int buffer) {
        float alpha[2];
        for (int h = 0; h < 2; h++) alpha[h] = *(float*)(shared + ALPHAS + (buffer * HEADS + g + 8 * h) * 4);
        if (!any_lane(alpha[0] != 1 || alpha[1] != 1)) return;
        for (int j = 0; j < 4; j++) {
            for (auto& tile : acc) tile[j] *= alpha[j / 2];
            zeros[j] *= alpha[j / 2], total[j] *= alpha[j / 2];
        }
    }

    // What outputs of 16 tokens are divided by at last.
    template <bool BFLOAT> __device__ inline void add_total(const u32 (&p)[4]) {
        constexpr u32 one = BFLOAT ? 0x3f803f80 : 0x3c003c00;
        const u32 ones[2] = {one, one};
        multiply_add<BFLOAT>(total, p, ones);
    }

    __device__ inline void add_tile(const char* stage, int buffer) {
        const int row = lane % 16;
        const char* from[SPAN / 32];
        for (int i = warp; i < STEPS; i += GATHERERS) {
            u32 p[4], zero[2];
            read<16>(p, shared + WEIGHTS + (buffer * STEPS + i) * 512 + lane * 16);
            read_transposed(zero, stage + ZERO + (16 * i + row) * 16);
            multiply_add<false>(zeros, p, zero);
            add_total<false>(p);
        }
        for (int i = 0; i < SPAN / 32; i++)
            from[i] = stage + row * ROW + (warp * SPAN + i * 32 + lane / 16 * 16 ^ swizzle(row));
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            u32 p[4], weights[PIECES][PARTS][4];
            read<16>(p, shared + WEIGHTS + (buffer * STEPS + i) * 512 + lane * 16);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                for (int part = 0; part < PARTS; part++) {
                    u32 scale[2];
                    read<8>(scale, shared + SCALES + (buffer * STEPS + i) * 256 + (group_of(piece * 4, part) * 4 + t) * 8);
                    for (int j = 0; j < 4; j++) weights[piece][part][j] = multiply(p[j], scale[j / 2]);
                }
#pragma unroll
            for (int pair = 0; pair < SPAN / 32; pair++) {
                u32 words[4];  // of two chunks: two bytes of tokens 2t and 2t + 1, and of the two that are 8 behind
                read_transposed(words, from[pair] + 16 * i * ROW);
#pragma unroll
                for (int chunk = 2 * pair; chunk < 2 * pair + 2; chunk++) {
                    u32 bytes[2][2];
                    for (int j = 0; j < 2; j++) halves(bytes[j], words[chunk % 2 * 2 + j]);
#pragma unroll
                    for (int y = 0; y < 2; y++)
#pragma unroll
                        for (int part = 0; part < PARTS; part++) {
                            u32 codes[2] = {code(bytes[0][y], part), code(bytes[1][y], part)};
                            multiply_add<false>(acc[tile_of(chunk, y, part)], weights[chunk / 4][part], codes);
                        }
                }
            }
        }
    }

    __device__ inline void add_tail(const u16* value, int first, int tail_tokens, int buffer) {
        const int steps = min(STEPS, (tail_tokens - first + 15) / 16);
#pragma unroll 2
        for (int i = 0; i < steps; i++) {
            u32 weights[4];
            read<16>(weights, shared + WEIGHTS + (buffer * STEPS + i) * 512 + lane * 16);
            if (i % GATHERERS == warp) add_total<BF16>(weights);
            const u16* rows[4];
            for (int j = 0; j < 4; j++)
                rows[j] = value + min(first + 16 * i + 2 * t + j % 2 + j / 2 * 8, tail_tokens - 1) * L + 2 * g;
#pragma unroll
            for (int chunk = 0; chunk < SPAN / 16; chunk++)
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    u32 x[4];
                    for (int j = 0; j < 4; j++) read<4>(x + j, rows[j] + channel_of(chunk, part));
#pragma unroll
                    for (int y = 0; y < 2; y++) {
                        u32 columns[2];
                        for (int j = 0; j < 2; j++) columns[j] = permute(x[2 * j], x[2 * j + 1], y ? 0x7632 : 0x5410);
                        float sum[4] = {};
                        multiply_add<BF16>(sum, weights, columns);
                        for (int j = 0; j < 4; j++) acc[tile_of(chunk, y, part)][j] += sum[j] * power_of_2(BITS * part - 24);
                    }
                }
        }
    }

    __device__ inline void leave_sums(float* to) {
        for (int h = 0; h < 2; h++) {
            float* own = to + (warp * HEADS + g + 8 * h) * SUMS;
            for (int e = 0; e < 2; e++) own[2 * t + e] = zeros[2 * h + e];
            if (t == 0) own[GROUPS] = total[2 * h];
        }
    }

    // Outputs of head g + 8h by four channels side by side, with the `sums` of all gatherers.
    template <typename Store> __device__ inline void finish(const float* sums, int h, Store store) {
        auto sum_of = [&](int column) {
            float sum = 0;
            for (int i = 0; i < GATHERERS; i++) sum += sums[(i * HEADS + g + 8 * h) * SUMS + column];
            return sum;
        };
        const float inverse = 1 / fmaxf(sum_of(GROUPS), 1e-37f);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                const float zero = sum_of(group_of(piece * 4, part));
#pragma unroll
                for (int chunk = piece * 4; chunk < piece * 4 + SPAN / PIECES / 16; chunk++) {
                    Floats4 x;
                    for (int i = 0; i < 4; i++) {
                        float sum = acc[tile_of(chunk, i % 2, part)][2 * h + i / 2];
                        x.x[i] = (sum * power_of_2(24 - BITS * part) + zero) * inverse;
                    }
                    store(channel_of(chunk, part) + 4 * t, x);
                }
            }
    }
};
