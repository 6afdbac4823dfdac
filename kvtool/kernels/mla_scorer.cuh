// Of mla_decode.cu, the first product: scores, and the weights that they give.

// Queries are multiplied by this and divided by a power of 2 near their largest: they stay below 64, and with the largest
// scale of rope keys, 2 · 65,504 / 255, within fp16.
constexpr int QUERY_BOOST = 5;

// The first of the four channels side by side that lane t has of a step of the first product. Of codes 0 and 2 come first.
__device__ inline int query_channel(int step, int t) {
    if (step < L / 16) return step % PARTS * ROW + step / PARTS / 4 * 64 + t * 16 + step / PARTS % 4 * 4;
    step -= L / 16;
    return L + (ROPE_BITS == 16 ? step / 2 * 32 + t * 8 + step % 2 * 4 : t * 16 + step * 4);
}

// Leave `queries` [heads, L + R] in shared memory as operands, divided by powers of 2 near their largest, in `tops`.
__device__ inline void leave_queries(Place at, float* tops, const u16* queries, int heads) {
    // Nothing is done before all is asked for: what a program waits for here, it waits for alone.
    constexpr int OWN = (HEADS + SCORERS - 1) / SCORERS, OWN_STEPS = (QUERY_STEPS + SCORERS - 1) / SCORERS;
    auto row_of = [&](int head) { return queries + min(head, heads - 1) * (L + R); };
    float largest[OWN];
    u32 words[OWN_STEPS][2][2];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        largest[i] = 1e-20f;
#pragma unroll
        for (int channel = at.lane * 8; channel < L + R; channel += 256) {
            u32 pairs[4];
            read<16>(pairs, row_of(at.warp + i * SCORERS) + channel);
            for (u32 pair : pairs)
                for (int e = 0; e < 2; e++) largest[i] = fmaxf(largest[i], fabsf(widen<BF16>((u16)(pair >> 16 * e))));
        }
    }
#pragma unroll
    for (int i = 0; i < OWN_STEPS; i++)
        for (int h = 0; h < 2; h++)
            read<8>(words[i][h], row_of(at.g + 8 * h) + query_channel(min(i * SCORERS + at.warp, QUERY_STEPS - 1), at.t));
    for (int i = 0; i < OWN; i++) {
        for (int mask = 1; mask < 32; mask *= 2) largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], mask));
        if (at.lane == 0 && at.warp + i * SCORERS < HEADS)
            tops[at.warp + i * SCORERS] = __uint_as_float(__float_as_uint(largest[i]) & 0x7f800000);
    }
    meet(SCORING, SCORERS * 32);
#pragma unroll
    for (int i = 0; i < OWN_STEPS; i++) {
        const int step = i * SCORERS + at.warp;
        if (step >= QUERY_STEPS) break;
        const bool exact = ROPE_BITS == 16 && step >= L / 16;
        u32 operand[4];
        for (int h = 0; h < 2; h++) {
            float factor = power_of_2(QUERY_BOOST) * __uint_as_float(0x7f000000 - __float_as_uint(tops[at.g + 8 * h])), x[4];
            if (step < L / 16) factor *= power_of_2(-BITS * (step % PARTS));
            for (int e = 0; e < 4; e++) x[e] = widen<BF16>((u16)(words[i][h][e / 2] >> e % 2 * 16)) * factor;
            for (int j = 0; j < 2; j++)
                operand[2 * j + h] = exact ? round_pair<BF16>(x[2 * j], x[2 * j + 1]) : round_pair<false>(x[j], x[j + 2]);
        }
        *(Words4*)(at.shared + QUERY + step * 512 + at.lane * 16) = {operand[0], operand[1], operand[2], operand[3]};
    }
    meet(SCORING, SCORERS * 32);
}

// A warp that scores.
struct Scorer : Place {
    u32 query[RESIDENT + 1][4];  // the first operands of the first product
    u32 query_sums[4];           // queries summed by group of channels, twice: as fp16, and what that leaves
    float to_log2[2];            // what a score takes to the exponent of 2, of heads g and g + 8
    float m[2];                  // the largest so far, at least: the same in all warps
    float s[OCTETS][4];          // scores of this warp's run: columns 2t and 2t + 1 of heads g and g + 8

    __device__ inline Scorer(Place at, const float* tops, float scale) : Place(at) {
        for (int h = 0; h < 2; h++) {
            to_log2[h] = tops[g + 8 * h] * scale * power_of_2(24 - QUERY_BOOST);
            m[h] = -1e30f;
        }
#pragma unroll
        for (int step = 0; step < RESIDENT; step++) read<16>(query[step], shared + QUERY + step * 512 + lane * 16);
        float sums[2][2];
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const u32 ones[2] = {0x3c003c00, 0x3c003c00};
            float sum[4] = {};
            int part = group / CHUNKS;
#pragma unroll
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
    }

    __device__ inline void read_query(u32 (&to)[4], int step) {
        if (step < RESIDENT)
            for (int j = 0; j < 4; j++) to[j] = query[step][j];
        else
            read<16>(to, shared + QUERY + step * 512 + lane * 16);
    }

    // Score a tile. `between` is what is done between its first products and the others, with the scores before.
    template <typename Between> __device__ inline void score(const char* stage, Between between) {
        const int row = warp * RUN + g;
        const char* codes[2];  // of chunks with an even number, and an odd one
        for (int i = 0; i < 2; i++) codes[i] = stage + row * ROW + (i * 64 + t * 16 ^ swizzle(row));
        // What is added at the end: offsets of all tokens and of each, and products with codes of rope keys.
        float offset[4] = {}, offsets[OCTETS][4] = {}, rope[OCTETS][4] = {}, next[OCTETS][4] = {};
        u32 keys[OCTETS][ROPE_ROW / 16], scales[OCTETS][2][4];
#pragma unroll
        for (int o = 0; o < OCTETS; o++) {
            for (int i = 0; i < ROPE_ROW / 64; i++) {
                const char* from = stage + ROPE + (row + 8 * o) * ROPE_ROW;
                read<16>(keys[o] + 4 * i, from + (i * 64 + t * 16 ^ rope_swizzle(row)));
            }
            for (int e = 0; e < 2; e++) read<16>(scales[o][e], stage + SCALE + (warp * RUN + 8 * o + 2 * t + e) * 16);
        }
        auto add_rope = [&](int step) {
            u32 operand[4], pairs[2];
            read_query(operand, L / 16 + step);
            if constexpr (ROPE_BITS == 8) {
                const char* at = stage + ROPE_SCALE + warp * RUN / DRAWN * (4 * R) + 2 * (t * 16 + step * 4);
                u32 scale[2], zero[2];
                read<8>(scale, at);
                read<8>(zero, at + 2 * R);
                pairs[0] = permute(zero[0], zero[1], 0x5410), pairs[1] = permute(zero[0], zero[1], 0x7632);
                multiply_add<false>(offset, operand, pairs);
                pairs[0] = permute(scale[0], scale[1], 0x5410), pairs[1] = permute(scale[0], scale[1], 0x7632);
                for (int j = 0; j < 4; j++) operand[j] = multiply(operand[j], pairs[j / 2]);
            }
            for (int o = 0; o < OCTETS; o++)
                if constexpr (ROPE_BITS == 8) {
                    pairs[0] = permute(keys[o][step], 0, 0x4240), pairs[1] = permute(keys[o][step], 0, 0x4341);
                    multiply_add<false>(rope[o], operand, pairs);
                } else {
                    pairs[0] = keys[o][2 * step], pairs[1] = keys[o][2 * step + 1];
                    multiply_add<BF16>(offsets[o], operand, pairs);
                }
        };
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            u32 words[OCTETS][4];
            float sum[CHAINS][OCTETS][4] = {};
            for (int o = 0; o < OCTETS; o++)
                read<16>(words[o], codes[chunk % 2] + chunk / 2 * 128 + 8 * o * ROW);
#pragma unroll
            for (int w = 0; w < 4; w++) {
                u32 pairs[OCTETS][2];
                for (int o = 0; o < OCTETS; o++) halves(pairs[o], words[o][w]);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    u32 operand[4];
                    read_query(operand, (chunk * 4 + w) * PARTS + part);
                    for (int o = 0; o < OCTETS; o++) {
                        u32 columns[2] = {code(pairs[o][0], part), code(pairs[o][1], part)};
                        multiply_add<false>(sum[PARTS < 2 ? w % 2 : part][o], operand, columns);
                    }
                }
            }
#pragma unroll
            for (int step = 4 * chunk / CHUNKS; step < 4 * (chunk + 1) / CHUNKS; step++) add_rope(step);
            for (int chain = 0; chain < CHAINS; chain++) {
                int group = chain % PARTS * CHUNKS + chunk;
                for (int o = 0; o < OCTETS; o++)
                    for (int e = 0; e < 2; e++) {
                        float scale = widen<false>((u16)(scales[o][e][group / 2] >> group % 2 * 16));
                        for (int h = 0; h < 2; h++) next[o][2 * h + e] += sum[chain][o][2 * h + e] * scale;
                    }
            }
            if (chunk == 0) between();
        }
        for (int o = 0; o < OCTETS; o++) {
            u32 zero[2];
            read<4>(zero, stage + ZERO + (row + 8 * o) * 16 + 4 * t);
            zero[1] = zero[0];
            multiply_add<false>(offsets[o], query_sums, zero);
            for (int j = 0; j < 4; j++) s[o][j] = next[o][j] + rope[o][j] + (offset[j] + offsets[o][j]) * power_of_2(-24);
        }
    }

    template <bool BFLOAT> __device__ inline void leave_weights(const float (&unit)[2], int buffer) {
        for (int o = 0; o < OCTETS; o += 2) {
            u32 p[4];
            for (int j = 0; j < 4; j++) {
                const float *two = s[o + j / 2] + j % 2 * 2, shift = boost(BITS) - m[j % 2];
                p[j] = round_pair<BFLOAT>(exp2_of(two[0] * unit[j % 2] + shift), exp2_of(two[1] * unit[j % 2] + shift));
            }
            const int step = buffer * STEPS + (warp * OCTETS + o) / 2;
            *(Words4*)(shared + WEIGHTS + step * 512 + lane * 16) = {p[0], p[1], p[2], p[3]};
        }
    }

    // Leave weights of these scores. They stay at most 1: where one of a warp that scores is above the maximum, all
    // make them a second time.
    template <bool BFLOAT> __device__ inline void weigh(const float (&unit)[2], int buffer) {
        float top[2], alpha[2] = {1, 1};
        for (int h = 0; h < 2; h++) {
            top[h] = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
            for (int o = 1; o < OCTETS; o++) top[h] = fmaxf(top[h], fmaxf(s[o][2 * h], s[o][2 * h + 1]));
            top[h] *= unit[h];
        }
        leave_weights<BFLOAT>(unit, buffer);
        if (any_member(SCORING, SCORERS * 32, top[0] > m[0] || top[1] > m[1])) {
            float* tops = (float*)(shared + TOPS);
            for (int h = 0; h < 2; h++) {
                for (int mask = 1; mask < 4; mask *= 2) top[h] = fmaxf(top[h], shuffle_xor(top[h], mask));
                if (t == 0) tops[warp * HEADS + g + 8 * h] = top[h];
            }
            meet(SCORING, SCORERS * 32);
            for (int h = 0; h < 2; h++) {
                for (int i = 0; i < SCORERS; i++) top[h] = fmaxf(top[h], tops[i * HEADS + g + 8 * h]);
                float raised = top[h] > m[h] ? top[h] + HEADROOM : m[h];
                alpha[h] = exp2_of(m[h] - raised);
                m[h] = raised;
            }
            leave_weights<BFLOAT>(unit, buffer);
        }
        if (warp == 0 && t == 0)
            for (int h = 0; h < 2; h++) *(float*)(shared + ALPHAS + (buffer * HEADS + g + 8 * h) * 4) = alpha[h];
    }

    // Tokens of the tile from `far` on are not seen.
    template <typename Between> __device__ inline void add_tile(const char* stage, int far, Between between) {
        score(stage, between);
        if (warp * RUN + RUN > far)
            for (int o = 0; o < OCTETS; o++)
                for (int e = 0; e < 2; e++)
                    if (warp * RUN + 8 * o + 2 * t + e >= far) s[o][e] = s[o][2 + e] = __uint_as_float(0xff800000);  // -∞
    }

    // Leave what gatherers need of the tile that was scored last.
    __device__ inline void leave_tile(const char* stage, int buffer) {
        for (int i = warp * RUN / 16; i < (warp + 1) * RUN / 16; i++) {
            u32 pairs[2];  // of tokens 2t and 2t + 1, and of the two that are 8 behind: scales of group g
            read_transposed(pairs, stage + SCALE + (16 * i + lane % 16) * 16);
            *(Words2*)(shared + SCALES + (buffer * STEPS + i) * 256 + lane * 8) = {pairs[0], pairs[1]};
        }
        weigh<false>(to_log2, buffer);
    }

    // TOKENS rows of the tail from `first` on, at the model's precision; what is before position `near` is not seen.
    __device__ inline void add_tail(
        const u16* queries, int heads, const u16* key, const u16* value, int first, int position, int near,
        int tail_tokens, float scale, int buffer
    ) {
        const u16 *low = queries + min(g, heads - 1) * (L + R), *high = queries + min(g + 8, heads - 1) * (L + R);
        auto seen = [&](int row) {  // the newest position that it can hold is
            return row < tail_tokens && position - (position - row + tail_tokens) % tail_tokens >= near;
        };
        for (auto& octet : s)
            for (float& x : octet) x = 0;
        const int end = any_lane(seen(first + warp * RUN + lane % RUN)) ? L + R : 0;
#pragma unroll 6
        for (int channel = 8 * t; channel < end; channel += 32) {
            u32 a[2][4];
            read<16>(a[0], low + channel);
            read<16>(a[1], high + channel);
            for (int o = 0; o < OCTETS; o++) {
                int row = min(first + warp * RUN + 8 * o + g, tail_tokens - 1);
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
                bool visible = seen(first + warp * RUN + 8 * o + 2 * t + e);
                if (!visible) s[o][e] = s[o][2 + e] = __uint_as_float(0xff800000);  // -∞
            }
        const float unit[2] = {scale, scale};
        weigh<BF16>(unit, buffer);
    }
};
