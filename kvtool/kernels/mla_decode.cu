// Decode attention over latents of integer codes (MLA, absorbed): a latent is key and value at once.
// `cuda_mla_decode.py` says what is computed.
//
// A program has 16 query heads, the rows of both products, and walks over tiles of tokens. To the first product each of
// its warps brings a run of tokens, with all of their channels, and leaves their weights in shared memory; to the second
// it brings a span of channels, of all tokens. A latent comes to shared memory once, as it lies in a block, and goes from
// there to either product without a conversion: the bits of a code, alone in an fp16, are the subnormal number
// code · 2^-24, exactly (times 2^(BITS · part) for higher parts of a byte).
//
//   scores   [16 heads, 8 tokens]    += queries [16 heads, 16 channels] · latents [16 channels, 8 tokens], ∘scale by group
//   outputs  [16 heads, 8 channels]  += (p∘scale) [16 heads, 16 tokens] · latents [16 tokens, 8 channels]
//
// A lane is 4g + t. A product takes the order of what it sums from whoever loads it: channels are dealt to the t of the
// first so that words are split without being rearranged, and tokens to the t of the second so that the t read rows that
// lie in different banks: column c of 8 is token c / 2 + c % 2 · 4.

constexpr int L = 512, R = 64;       // channels of a latent and of a rope key
constexpr int GROUPS = L / 64;       // of a latent's channels that share a scale
constexpr int PARTS = 8 / BITS;      // codes in a byte
constexpr int ROW = L / PARTS;       // bytes of a latent
constexpr int ROPE_ROW = R * ROPE_BITS / 8;
constexpr int CHUNKS = ROW / 64;     // of a latent's bytes, each of which has a group of every part
constexpr int HEADS = 16;
constexpr int RUN = TOKENS / WARPS;  // tokens that a warp brings to the first product
constexpr int OCTETS = RUN / 8;
constexpr int STEPS = TOKENS / 16;   // of the second product
constexpr int SPAN = ROW / WARPS;    // bytes of a latent that a warp brings to the second product
constexpr int PIECE = SPAN < 64 ? SPAN : 64, PIECES = SPAN / PIECE;
constexpr int WIDTH = PIECE / 8;     // bytes of a lane, of each piece of a token
constexpr int QUERY_STEPS = (L + R) / 16;

// A stage of the ring, and what else is in shared memory.
constexpr int ROPE = TOKENS * ROW;
constexpr int SCALE = ROPE + TOKENS * ROPE_ROW;
constexpr int ZERO = SCALE + TOKENS * 2 * GROUPS;
constexpr int ROPE_SCALE = ZERO + TOKENS * 2 * GROUPS;  // of each warp's block: scales and zeros by channel
constexpr int STAGE = ROPE_SCALE + (ROPE_BITS == 8 ? WARPS * 4 * R : 0);
constexpr int QUERY = STAGES * STAGE;                   // operands of the first product, [step][lane]
constexpr int WEIGHTS = QUERY + QUERY_STEPS * 512;      // of the second, [2][step][lane]
constexpr int SCALES = WEIGHTS + 2 * STEPS * 512;       // of pairs of tokens, [2][step][group][t]
constexpr int TOPS = SCALES + 2 * STEPS * 256;          // [warp][head]
extern "C" __constant__ const int shared_bytes = TOPS + WARPS * HEADS * 4;

static_assert(RUN % 8 == 0 && BLOCK % RUN == 0 && TOKENS % 16 == 0 && WIDTH >= 2);
static_assert(STAGES >= 2 && RESIDENT <= L / 16 && QUERY >= WARPS * HEADS * (GROUPS + 1) * 4);

// Queries are multiplied by this and divided by a power of 2 near their largest: they stay below 64, and with the largest
// scale of rope keys, 2 · 65,504 / 255, within fp16.
constexpr int QUERY_BOOST = 5;

__device__ inline int token_of(int column) { return column / 2 + column % 2 * 4; }

// Where bytes of row `row` are moved to, by an exclusive or with their place.
__device__ inline int swizzle(int row) { return ((row ^ row >> 2) & 1) * 64 | (row >> 1 & 1) * 32; }
__device__ inline int rope_swizzle(int row) { return (row >> 2 & 1) * 64; }

// `row` is the first of a warp's run, of its block.
__device__ inline void fetch(char* stage, Stream key, Stream value, u64 block, int row) {
    const int warp = threadIdx.x / 32, own = warp * RUN;
    copy<RUN * ROW>(stage + own * ROW, value.codes + block + row * ROW, [](int at, int lane) {
        return at + lane ^ swizzle((at + lane) / ROW);
    });
    copy<RUN * ROPE_ROW>(stage + ROPE + own * ROPE_ROW, key.codes + block + row * ROPE_ROW, [](int at, int lane) {
        return at + lane ^ rope_swizzle((at + lane) / ROPE_ROW);
    });
    auto plain = [](int at, int lane) { return at + lane; };
    copy<RUN * 2 * GROUPS>(stage + SCALE + own * (2 * GROUPS), value.scale + block + row * (2 * GROUPS), plain);
    copy<RUN * 2 * GROUPS>(stage + ZERO + own * (2 * GROUPS), value.zero + block + row * (2 * GROUPS), plain);
    if constexpr (ROPE_BITS == 8) {
        copy<2 * R>(stage + ROPE_SCALE + warp * (4 * R), key.scale + block, plain);
        copy<2 * R>(stage + ROPE_SCALE + warp * (4 * R) + 2 * R, key.zero + block, plain);
    }
}

// The first of the four channels side by side that lane t has of a step of the first product. Of codes 0 and 2 come first.
__device__ inline int query_channel(int step, int t) {
    if (step < L / 16) return step % PARTS * ROW + step / PARTS / 4 * 64 + t * 16 + step / PARTS % 4 * 4;
    step -= L / 16;
    return L + (ROPE_BITS == 16 ? step / 2 * 32 + t * 8 + step % 2 * 4 : t * 16 + step * 4);
}

// Bytes 0 and 2, 1 and 3 of a word: of 8 bits as they are, of less with all of their parts.
__device__ inline void halves(u32 (&to)[2], u32 word) {
    if constexpr (BITS == 8) to[0] = permute(word, 0, 0x4240), to[1] = permute(word, 0, 0x4341);
    else to[0] = word, to[1] = word >> 8;
}
__device__ inline u32 code(u32 half, int part) { return BITS == 8 ? half : half & code_mask(BITS, part); }

struct Warp {
    char* shared;
    int warp, lane, g, t;
    u32 query[RESIDENT + 1][4];     // the first operands of the first product
    u32 query_sums[4];              // queries summed by group of channels, twice: as fp16, and what that leaves
    float to_log2[2];               // what a score takes to the exponent of 2, of heads g and g + 8
    float m[2];                     // the largest so far, at least: the same in all warps
    float acc[512 / WARPS / 8][4];  // outputs times 2^(BITS · part - 24)
    float zeros[4], total[4];       // Σ p∘zero by group, Σ p: of this warp's tokens alone

    __device__ inline void read_query(u32 (&to)[4], int step) { read<16>(to, shared + QUERY + step * 512 + lane * 16); }

    // Leave `queries` [heads, L + R] in shared memory as operands.
    __device__ inline void set_queries(const u16* queries, int heads, float scale) {
        // Nothing is done before all is asked for: what a program waits for here, it waits for alone.
        float* tops = (float*)(shared + TOPS);
        float largest[HEADS / WARPS];
#pragma unroll
        for (int i = 0; i < HEADS / WARPS; i++) {
            largest[i] = 1e-20f;
#pragma unroll
            for (int channel = lane * 8; channel < L + R; channel += 256) {
                u32 words[4];
                read<16>(words, queries + min(warp + i * WARPS, heads - 1) * (L + R) + channel);
                for (u32 word : words)
                    for (int e = 0; e < 2; e++) largest[i] = fmaxf(largest[i], fabsf(widen<BF16>((u16)(word >> 16 * e))));
            }
        }
        for (int i = 0; i < HEADS / WARPS; i++) {
            for (int mask = 1; mask < 32; mask *= 2) largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], mask));
            if (lane == 0) tops[warp + i * WARPS] = __uint_as_float(__float_as_uint(largest[i]) & 0x7f800000);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < QUERY_STEPS; i += WARPS) {
            int step = i + warp;
            if (step >= QUERY_STEPS) break;
            const bool exact = ROPE_BITS == 16 && step >= L / 16;
            u32 operand[4];
            for (int h = 0; h < 2; h++) {
                u32 words[2];
                read<8>(words, queries + min(g + 8 * h, heads - 1) * (L + R) + query_channel(step, t));
                float factor = power_of_2(QUERY_BOOST) / tops[g + 8 * h], x[4];
                if (step < L / 16) factor *= power_of_2(-BITS * (step % PARTS));
                for (int e = 0; e < 4; e++) x[e] = widen<BF16>((u16)(words[e / 2] >> e % 2 * 16)) * factor;
                for (int j = 0; j < 2; j++)
                    operand[2 * j + h] = exact ? round_pair<BF16>(x[2 * j], x[2 * j + 1]) : round_pair<false>(x[j], x[j + 2]);
            }
            *(Words4*)(shared + QUERY + step * 512 + lane * 16) = {operand[0], operand[1], operand[2], operand[3]};
        }
        for (int h = 0; h < 2; h++) to_log2[h] = tops[g + 8 * h] * scale * power_of_2(24 - QUERY_BOOST);
        __syncthreads();
        float sums[2][2];
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const u32 ones[2] = {0x3c003c00, 0x3c003c00};
            float sum[4] = {};
            int part = group / CHUNKS;
            for (int w = 0; w < 4; w++) {
                u32 operand[4];
                read_query(operand, (group % CHUNKS * 4 + w) * PARTS + part);
                multiply_add<false>(sum, operand, ones);
            }
            for (int h = 0; h < 2; h++)
                if (group / 2 == t) sums[h][group % 2] = sum[2 * h] * power_of_2(BITS * part);
        }
        for (int h = 0; h < 2; h++) {
            u32 high = query_sums[h] = round_pair<false>(sums[h][0], sums[h][1]);
            query_sums[2 + h] = round_pair<false>(sums[h][0] - widen<false>((u16)high), sums[h][1] - widen<false>(high >> 16));
        }
        for (int step = 0; step < RESIDENT; step++) read_query(query[step], step);
    }

    // Scores of this warp's run: its columns 2t and 2t + 1 of heads g and g + 8.
    __device__ inline void score(const char* stage, float (&s)[OCTETS][4]) {
        const int row = warp * RUN + token_of(g);
        float offset[4] = {};
        u32 rope[4][4];
#pragma unroll
        for (int step = 0; step < 4; step++) {
            read_query(rope[step], L / 16 + step);
            if constexpr (ROPE_BITS == 8) {
                const char* at = stage + ROPE_SCALE + warp * (4 * R) + 2 * (t * 16 + step * 4);
                u32 scale[2], zero[2], pairs[2];
                read<8>(scale, at);
                read<8>(zero, at + 2 * R);
                pairs[0] = permute(zero[0], zero[1], 0x5410), pairs[1] = permute(zero[0], zero[1], 0x7632);
                multiply_add<false>(offset, rope[step], pairs);
                pairs[0] = permute(scale[0], scale[1], 0x5410), pairs[1] = permute(scale[0], scale[1], 0x7632);
                for (int j = 0; j < 4; j++) rope[step][j] = multiply(rope[step][j], pairs[j / 2]);
            }
        }
        u32 scales[OCTETS][2][4];
#pragma unroll
        for (int o = 0; o < OCTETS; o++) {
            u32 zero[2];
            read<4>(zero, stage + ZERO + (row + 8 * o) * 16 + 4 * t);
            zero[1] = zero[0];
            for (int j = 0; j < 4; j++) s[o][j] = offset[j];
            multiply_add<false>(s[o], query_sums, zero);
            const char* keys = stage + ROPE;
            const int place = (row + 8 * o) * ROPE_ROW + t * 16 ^ rope_swizzle(row);
            u32 words[4];
            if constexpr (ROPE_BITS == 16)
                for (int step = 0; step < 4; step += 2) {
                    read<16>(words, keys + (place ^ step * 32));
                    for (int i = 0; i < 2; i++) {
                        u32 pairs[2] = {words[2 * i], words[2 * i + 1]};
                        multiply_add<BF16>(s[o], rope[step + i], pairs);
                    }
                }
            for (int j = 0; j < 4; j++) s[o][j] *= power_of_2(-24);
            if constexpr (ROPE_BITS == 8) {
                read<16>(words, keys + place);
                for (int step = 0; step < 4; step++) {
                    u32 codes[2] = {permute(words[step], 0, 0x4240), permute(words[step], 0, 0x4341)};
                    multiply_add<false>(s[o], rope[step], codes);
                }
            }
            for (int e = 0; e < 2; e++) read<16>(scales[o][e], stage + SCALE + (warp * RUN + 8 * o + t + 4 * e) * 16);
        }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            u32 words[OCTETS][4];
            float sum[PARTS][OCTETS][4] = {};
            for (int o = 0; o < OCTETS; o++)
                read<16>(words[o], stage + (row + 8 * o) * ROW + (chunk * 64 + t * 16 ^ swizzle(row)));
#pragma unroll
            for (int w = 0; w < 4; w++) {
                u32 pairs[OCTETS][2];
                for (int o = 0; o < OCTETS; o++) halves(pairs[o], words[o][w]);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    int step = (chunk * 4 + w) * PARTS + part;
                    u32 operand[4];
                    if (step < RESIDENT)
                        for (int j = 0; j < 4; j++) operand[j] = query[step][j];
                    else
                        read_query(operand, step);
                    for (int o = 0; o < OCTETS; o++) {
                        u32 codes[2] = {code(pairs[o][0], part), code(pairs[o][1], part)};
                        multiply_add<false>(sum[part][o], operand, codes);
                    }
                }
            }
            for (int part = 0; part < PARTS; part++) {
                int group = part * CHUNKS + chunk;
                for (int o = 0; o < OCTETS; o++)
                    for (int e = 0; e < 2; e++) {
                        float scale = widen<false>((u16)(scales[o][e][group / 2] >> group % 2 * 16));
                        for (int h = 0; h < 2; h++) s[o][2 * h + e] += sum[part][o][2 * h + e] * scale;
                    }
            }
        }
    }

    template <bool BFLOAT> __device__ inline void leave_weights(
        const float (&s)[OCTETS][4], const float (&unit)[2], u32 (&p)[OCTETS][2], int buffer
    ) {
        for (int o = 0; o < OCTETS; o++) {
            for (int h = 0; h < 2; h++) {
                float shift = boost(BITS) - m[h];
                p[o][h] = round_pair<BFLOAT>(exp2_of(s[o][2 * h] * unit[h] + shift), exp2_of(s[o][2 * h + 1] * unit[h] + shift));
            }
            int at = warp * OCTETS + o;
            *(Words2*)(shared + WEIGHTS + (buffer * STEPS + at / 2) * 512 + lane * 16 + at % 2 * 8) = {p[o][0], p[o][1]};
        }
    }

    // Make weights of the scores of all warps and let all have them; `p` are this warp's own. They stay at most 1: where
    // a score is above the maximum, they are made a second time.
    template <bool BFLOAT> __device__ inline void exchange(
        const float (&s)[OCTETS][4], const float (&unit)[2], u32 (&p)[OCTETS][2], int buffer
    ) {
        float top[2];
        for (int h = 0; h < 2; h++) {
            top[h] = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
            for (int o = 1; o < OCTETS; o++) top[h] = fmaxf(top[h], fmaxf(s[o][2 * h], s[o][2 * h + 1]));
            top[h] *= unit[h];
        }
        leave_weights<BFLOAT>(s, unit, p, buffer);
        if (!any_thread(top[0] > m[0] || top[1] > m[1])) return;
        float* tops = (float*)(shared + TOPS);
        for (int h = 0; h < 2; h++) {
            for (int mask = 1; mask < 4; mask *= 2) top[h] = fmaxf(top[h], shuffle_xor(top[h], mask));
            if (t == 0) tops[warp * HEADS + g + 8 * h] = top[h];
        }
        __syncthreads();
        for (int h = 0; h < 2; h++) {
            for (int i = 0; i < WARPS; i++) top[h] = fmaxf(top[h], tops[i * HEADS + g + 8 * h]);
            float raised = top[h] > m[h] ? top[h] + HEADROOM : m[h], alpha = exp2_of(m[h] - raised);
            m[h] = raised;
            for (int e = 2 * h; e < 2 * h + 2; e++) {
                for (auto& tile : acc) tile[e] *= alpha;
                zeros[e] *= alpha;
                total[e] *= alpha;
            }
        }
        leave_weights<BFLOAT>(s, unit, p, buffer);
        __syncthreads();
    }

    // `sums` [16 heads, 8] += this warp's weights · `columns` [its tokens, 8].
    template <bool BFLOAT> __device__ inline void add_own(
        float (&sums)[4], const u32 (&p)[OCTETS][2], const u32 (&columns)[OCTETS]
    ) {
        for (int o = 0; o < OCTETS; o += 2) {
            bool two = o + 1 < OCTETS;
            u32 weights[4] = {p[o][0], p[o][1], two ? p[o + two][0] : 0, two ? p[o + two][1] : 0};
            u32 pairs[2] = {columns[o], two ? columns[o + two] : 0};
            multiply_add<BFLOAT>(sums, weights, pairs);
        }
    }

    // Tokens of the tile from `far` on are not seen. `refill` is called when all have left the stage before.
    template <typename Refill> __device__ inline void add_tile(const char* stage, int far, int buffer, Refill refill) {
        float s[OCTETS][4];
        score(stage, s);
        if (warp * RUN + RUN > far)
            for (int o = 0; o < OCTETS; o++)
                for (int e = 0; e < 2; e++)
                    if (warp * RUN + 8 * o + t + 4 * e >= far) s[o][e] = s[o][2 + e] = __uint_as_float(0xff800000);  // -∞
        u32 zero[OCTETS], ones[OCTETS];
        for (int o = 0; o < OCTETS; o++) {
            int token = warp * RUN + 8 * o + token_of(g), at = warp * OCTETS + o;
            u32 scale;
            read<4>(&scale, stage + SCALE + token * 16 + 4 * t);
            read<4>(&zero[o], stage + ZERO + token * 16 + 4 * t);
            zero[o] = transpose(zero[o]), ones[o] = 0x3c003c00;
            *(u32*)(shared + SCALES + (buffer * STEPS + at / 2) * 256 + lane * 8 + at % 2 * 4) = transpose(scale);
        }
        u32 p[OCTETS][2];
        exchange<false>(s, to_log2, p, buffer);
        refill();
        add_own<false>(zeros, p, zero);
        add_own<false>(total, p, ones);
        gather(stage, buffer);
    }

    __device__ inline void gather(const char* stage, int buffer) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            u32 p[4], weights[PIECES][PARTS][4];
            read<16>(p, shared + WEIGHTS + (buffer * STEPS + i) * 512 + lane * 16);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                for (int part = 0; part < PARTS; part++) {
                    u32 scale[2];
                    read<8>(scale, shared + SCALES + (buffer * STEPS + i) * 256 + (group_of(piece, part) * 4 + t) * 8);
                    for (int j = 0; j < 4; j++) weights[piece][part][j] = multiply(p[j], scale[j / 2]);
                }
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                u32 words[4][(WIDTH + 3) / 4];
                for (int j = 0; j < 4; j++) {
                    int row = 4 * j + t, place = warp * SPAN + piece * PIECE + g * WIDTH;
                    read<WIDTH>(words[j], stage + (16 * i + row) * ROW + (place ^ swizzle(row)));
                }
#pragma unroll
                for (int b = 0; b < WIDTH; b += 2) {
                    u32 pairs[2][2];  // bytes b and b + 1, of two tokens each
                    for (int j = 0; j < 2; j++)
                        halves(pairs[j], permute(words[2 * j][b / 4], words[2 * j + 1][b / 4], b % 4 ? 0x7632 : 0x5410));
#pragma unroll
                    for (int y = 0; y < 2; y++)
#pragma unroll
                        for (int part = 0; part < PARTS; part++) {
                            u32 codes[2] = {code(pairs[0][y], part), code(pairs[1][y], part)};
                            multiply_add<false>(acc[tile_of(piece, b + y, part)], weights[piece][part], codes);
                        }
                }
            }
        }
    }

    // Which columns of `acc` are byte `b` of the lanes' pieces; what scales them, and their channel of lane g = 0.
    __device__ static constexpr int tile_of(int piece, int b, int part) { return (piece * WIDTH + b) * PARTS + part; }
    __device__ inline int group_of(int piece, int part) { return part * CHUNKS + (warp * SPAN + piece * PIECE) / 64; }
    __device__ inline int channel_of(int piece, int part) { return part * ROW + warp * SPAN + piece * PIECE; }

    // TOKENS rows of the tail from `first` on, at the model's precision; what is before position `near` is not seen.
    __device__ inline void add_tail(
        const u16* queries, int heads, const u16* key, const u16* value, int first, int position, int near,
        int tail_tokens, float scale, int buffer
    ) {
        float s[OCTETS][4] = {};
        const u16 *low = queries + min(g, heads - 1) * (L + R), *high = queries + min(g + 8, heads - 1) * (L + R);
#pragma unroll 2
        for (int channel = 8 * t; channel < L + R; channel += 32) {
            u32 a[2][4];
            read<16>(a[0], low + channel);
            read<16>(a[1], high + channel);
            for (int o = 0; o < OCTETS; o++) {
                int row = min(first + warp * RUN + 8 * o + token_of(g), tail_tokens - 1);
                u32 words[4];
                read<16>(words, channel < L ? value + row * L + channel : key + row * R + channel - L);
                for (int i = 0; i < 4; i += 2) {
                    u32 rows[4] = {a[0][i], a[1][i], a[0][i + 1], a[1][i + 1]}, columns[2] = {words[i], words[i + 1]};
                    multiply_add<BF16>(s[o], rows, columns);
                }
            }
        }
        for (int o = 0; o < OCTETS; o++)
            for (int e = 0; e < 2; e++) {
                int row = first + warp * RUN + 8 * o + t + 4 * e;
                int at = position - (position - row + tail_tokens) % tail_tokens;  // the newest that it can hold
                if (row >= tail_tokens || at < near) s[o][e] = s[o][2 + e] = __uint_as_float(0xff800000);  // -∞
            }
        u32 p[OCTETS][2];
        const float unit[2] = {scale, scale};
        exchange<BF16>(s, unit, p, buffer);
        u32 ones[OCTETS];
        for (auto& column : ones) column = BF16 ? 0x3f803f80 : 0x3c003c00;
        add_own<BF16>(total, p, ones);
#pragma unroll 1
        for (int i = 0; i < STEPS; i++) {
            u32 weights[4];
            read<16>(weights, shared + WEIGHTS + (buffer * STEPS + i) * 512 + lane * 16);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    u32 words[4][WIDTH / 2];
                    for (int j = 0; j < 4; j++) {
                        int row = min(first + 16 * i + 4 * j + t, tail_tokens - 1);
                        read<2 * WIDTH>(words[j], value + row * L + channel_of(piece, part) + g * WIDTH);
                    }
#pragma unroll
                    for (int b = 0; b < WIDTH; b++) {
                        u32 columns[2];
                        for (int j = 0; j < 2; j++)
                            columns[j] = permute(words[2 * j][b / 2], words[2 * j + 1][b / 2], b % 2 ? 0x7632 : 0x5410);
                        float sum[4] = {};
                        multiply_add<BF16>(sum, weights, columns);
                        for (int j = 0; j < 4; j++) acc[tile_of(piece, b, part)][j] += sum[j] * power_of_2(BITS * part - 24);
                    }
                }
        }
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM) latent_decode(
    const u16* queries,  // [n, heads, L + R]
    u16* out,            // [n, heads, L]
    float* partial,      // [n, heads, splits, L], with splits
    float* lse,          // [n, heads, splits]
    int* arrivals,       // [n, ⌈heads / 16⌉] zeros, before and after; or null: another kernel merges
    const Index* table,
    const Index* positions,
    const Index* visible,
    const Index* slots,
    Stream key,
    Stream value,
    float scale,         // to the exponent of 2
    int table_stride,
    int block_units,     // 16 bytes each, as slot_units
    int slot_units,
    int num_heads,
    int tail_tokens
) {
    extern __shared__ Words4 dynamic[];
    char* shared = (char*)dynamic;
    const int rows = (num_heads + HEADS - 1) / HEADS, seq = blockIdx.x / rows, head = blockIdx.x % rows * HEADS;
    const int heads = min(HEADS, num_heads - head), split = blockIdx.y, splits = gridDim.y;
    if (CHAINED) await_inputs();
    const int position = positions[seq], near = visible[seq], far = min(near, position + 1);
    // As in decode.cu: what starts soon fetches weights to L2, and a long read would drive them out again.
    if (CHAINED && (int)gridDim.x / rows * position < 8192) start_next();

    // Programs share the tiles, as many as there are shares. The last has the tail too, whose bytes are three to nine
    // times as many for each token.
    const u64 row = (u64)seq * num_heads + head;
    const int tiles = (far + TOKENS - 1) / TOKENS, tail_units = (tail_tokens * 4 + TOKENS - 1) / TOKENS;
    const int units = max(1, tiles + tail_units), share = (units + splits - 1) / splits;
    const int shares = (units + share - 1) / share;
    if (arrivals && split >= shares) return;
    const int begin = min(tiles, split * share), end = min(tiles, (split + 1) * share);

    Warp w;
    w.shared = shared, w.warp = threadIdx.x / 32, w.lane = lane_id(), w.g = w.lane / 4, w.t = w.lane % 4;
    // Tile k is begin + k; each lane looks up the block of this warp's run in one of the next 32. What would begin behind
    // the last token is fetched from where that is.
    table += (u64)seq * table_stride;
    const int last = (far - 1) / RUN * RUN;
    int blocks = 0;
    auto run_of = [&](int tile) { return min(tile * TOKENS + w.warp * RUN, last); };
    auto fetch_tile = [&](int k) {
        if (k % 32 == 0 && begin + k + w.lane < end) blocks = table[run_of(begin + k + w.lane) / BLOCK];
        u64 block = (u64)shuffle(blocks, k % 32) * block_units * 16;
        if (begin + k < end) fetch(shared + k % STAGES * STAGE, key, value, block, run_of(begin + k) % BLOCK);
        end_group();
    };
    for (int k = 0; k < STAGES - 1; k++) fetch_tile(k);

    queries += row * (L + R);
    w.set_queries(queries, heads, scale);
    for (int h = 0; h < 2; h++) w.m[h] = -1e30f;
    for (int j = 0; j < 4; j++) {
        w.zeros[j] = w.total[j] = 0;
        for (auto& tile : w.acc) tile[j] = 0;
    }

    int k = 0;
    for (; begin + k < end; k++) {
        await_groups<STAGES - 2>();
        w.add_tile(shared + k % STAGES * STAGE, far - (begin + k) * TOKENS, k % 2, [&] { fetch_tile(k + STAGES - 1); });
    }
    if (tail_tokens && split == shares - 1) {
        u64 tail = (u64)slots[seq] * slot_units * 16;
        for (int first = 0; first < tail_tokens; first += TOKENS, k++)
            w.add_tail(queries, heads, (const u16*)(key.tail + tail), (const u16*)(value.tail + tail), first, position, near,
                       tail_tokens, scale, k % 2);
    }

    // Warps meet: each has the sums of its own tokens.
    await_groups<0>();
    __syncthreads();
    float* sums = (float*)shared;  // [warp][head][groups, and p]
    constexpr int SUMS = GROUPS + 1;
    for (int h = 0; h < 2; h++) {
        float* own = sums + (w.warp * HEADS + w.g + 8 * h) * SUMS;
        for (int e = 0; e < 2; e++) own[2 * w.t + e] = w.zeros[2 * h + e];
        if (w.t == 0) own[GROUPS] = w.total[2 * h];
    }
    __syncthreads();
    const bool alone = splits == 1 || arrivals && shares == 1;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int own = w.g + 8 * h;
        auto sum_of = [&](int column) {
            float sum = 0;
            for (int i = 0; i < WARPS; i++) sum += sums[(i * HEADS + own) * SUMS + column];
            return sum;
        };
        const float total = fmaxf(sum_of(GROUPS), 1e-37f), inverse = 1 / total;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const float zero = sum_of(w.group_of(piece, part));
                const int channel = w.channel_of(piece, part) + 2 * w.t * WIDTH;
#pragma unroll
                for (int at = 0; at < 2 * WIDTH; at += 4) {
                    Floats4 x;
                    for (int i = 0; i < 4; i++) {
                        float sum = w.acc[w.tile_of(piece, (at + i) % WIDTH, part)][2 * h + (at + i) / WIDTH];
                        x.x[i] = (sum * power_of_2(24 - BITS * part) + zero) * inverse;
                    }
                    if (own >= heads) continue;
                    if (alone)
                        *(Words2*)(out + (row + own) * L + channel + at) = {
                            round_pair<BF16>(x.x[0], x.x[1]), round_pair<BF16>(x.x[2], x.x[3])
                        };
                    else
                        *(Floats4*)(partial + ((row + own) * splits + split) * L + channel + at) = x;
                }
            }
        if (!alone && own < heads && w.warp == 0 && w.t == 0) lse[(row + own) * splits + split] = w.m[h] + log2_of(total);
    }
    if (alone || !arrivals) return;
    __syncthreads();  // sums are read
    merge_splits<L>(arrivals + blockIdx.x, (float*)shared, partial, lse, out, row, heads, splits, shares);
}
