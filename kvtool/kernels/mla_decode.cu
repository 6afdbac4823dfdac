// Decode attention over latents of integer codes (MLA, absorbed): a latent is key and value at once.
// `cuda_mla_decode.py` says what is computed.
//
// A program has 16 query heads, the rows of both products, and walks over tiles of tokens. Some of its warps score: each
// has a run of tokens of a tile, with all of their channels, and leaves their weights in shared memory. The others
// gather: each has a span of channels, of all tokens of the tile. So queries stay in registers of the ones and outputs in
// those of the others, and a warp has a neighbour of the other kind, which is a tile ahead or behind. A latent comes to
// shared memory once, as it lies in a block, and goes from there to either product without a conversion: the bits of a
// code, alone in an fp16, are the subnormal number code · 2^-24, exactly (times 2^(BITS · part) for higher parts of a
// byte).
//
//   scores   [16 heads, 8 tokens]    += queries [16 heads, 16 channels] · latents [16 channels, 8 tokens], ∘scale by group
//   outputs  [16 heads, 8 channels]  += (p∘scale) [16 heads, 16 tokens] · latents [16 tokens, 8 channels]
//
// A lane is 4g + t. A product takes the order of what it sums from whoever loads it: channels are dealt to the t of the
// first so that words are split without being rearranged; to the second, pairs of tokens come transposed.

constexpr int L = 512, R = 64;             // channels of a latent and of a rope key
constexpr int GROUPS = L / 64;             // of a latent's channels that share a scale
constexpr int PARTS = 8 / BITS;            // codes in a byte
constexpr int ROW = L / PARTS;             // bytes of a latent
constexpr int ROPE_ROW = R * ROPE_BITS / 8;
constexpr int CHUNKS = ROW / 64;           // of a latent's bytes, each of which has a group of every part
constexpr int HEADS = 16;
constexpr int RUN = TOKENS / SCORERS;      // tokens of a warp that scores
constexpr int OCTETS = RUN / 8;
constexpr int STEPS = TOKENS / 16;         // of the second product
constexpr int SPAN = ROW / GATHERERS;      // bytes of a latent of a warp that gathers
constexpr int DRAWN = TOKENS / GATHERERS;  // tokens that it brings to shared memory
constexpr int QUERY_STEPS = (L + R) / 16;
constexpr bool AHEAD = STAGES > 3;         // a tile is scored while weights of the one before are made
constexpr int CHAINS = PARTS < 2 ? 2 : PARTS;  // sums of a chunk: a product waits long for what it adds to

// A stage of the ring, and what else is in shared memory.
constexpr int ROPE = TOKENS * ROW;
constexpr int SCALE = ROPE + TOKENS * ROPE_ROW;
constexpr int ZERO = SCALE + TOKENS * 2 * GROUPS;
constexpr int ROPE_SCALE = ZERO + TOKENS * 2 * GROUPS;  // of the blocks of DRAWN tokens: scales and zeros by channel
constexpr int STAGE = ROPE_SCALE + (ROPE_BITS == 8 ? GATHERERS * 4 * R : 0);
constexpr int QUERY = STAGES * STAGE;                   // operands of the first product, [step][lane]
constexpr int WEIGHTS = QUERY + QUERY_STEPS * 512;      // of the second, [2][step][lane]
constexpr int SCALES = WEIGHTS + 2 * STEPS * 512;       // of pairs of tokens, [2][step][group][t]
constexpr int ALPHAS = SCALES + 2 * STEPS * 256;        // [2][head]: what outputs so far are multiplied by
constexpr int TOPS = ALPHAS + 2 * HEADS * 4;            // [warp][head]
constexpr int SUMS = GROUPS + 1;                        // where gatherers meet, [gatherer][head]: Σ p∘zero by group, Σ p
extern "C" __constant__ const int shared_bytes = TOPS + SCORERS * HEADS * 4;

static_assert(RUN % 16 == 0 && BLOCK % RUN == 0 && BLOCK % DRAWN == 0 && SPAN % 32 == 0);
static_assert(RUN % DRAWN == 0 || DRAWN % RUN == 0);
static_assert(STAGE % 128 == 0 && STAGES >= 3 && RESIDENT <= QUERY_STEPS && WARPS == SCORERS + GATHERERS);

// Barriers: of those that score; and of all, at which one team only arrives: what it says of a buffer, or of tile 0.
constexpr int SCORING = 1, FULL = 2, READY = 4, BEGUN = 6, ALL = WARPS * 32;

// Queries are multiplied by this and divided by a power of 2 near their largest: they stay below 64, and with the largest
// scale of rope keys, 2 · 65,504 / 255, within fp16.
constexpr int QUERY_BOOST = 5;

// Where bytes of row `row` are moved to, by an exclusive or with their place: eight rows side by side lie in different
// banks, chunk by chunk of 16 bytes, and so do two of them by four chunks.
__device__ inline int swizzle(int row) { return (row & 1) * 64 | (row >> 1 & 3) * 16; }
__device__ inline int rope_swizzle(int row) { return ROPE_BITS == 16 ? (row & 1) * 64 : 0; }

// DRAWN tokens, the `own`-th of a tile; `row` is the first of them, of its block.
__device__ inline void fetch(char* stage, Stream key, Stream value, u64 block, int row, int own) {
    char* run = stage + own * DRAWN * ROW;
    copy<DRAWN * ROW>(run, value.codes + block + row * ROW, [](int at, int lane) {
        return at + (lane ^ swizzle(lane / ROW) ^ swizzle(at / ROW));
    });
    run = stage + ROPE + own * DRAWN * ROPE_ROW;
    copy<DRAWN * ROPE_ROW>(run, key.codes + block + row * ROPE_ROW, [](int at, int lane) {
        return at + (lane ^ rope_swizzle(lane / ROPE_ROW));
    });
    auto plain = [](int at, int lane) { return at + lane; };
    copy<DRAWN * 2 * GROUPS>(stage + SCALE + own * DRAWN * 2 * GROUPS, value.scale + block + row * (2 * GROUPS), plain);
    copy<DRAWN * 2 * GROUPS>(stage + ZERO + own * DRAWN * 2 * GROUPS, value.zero + block + row * (2 * GROUPS), plain);
    if constexpr (ROPE_BITS == 8) {
        copy<2 * R>(stage + ROPE_SCALE + own * (4 * R), key.scale + block, plain);
        copy<2 * R>(stage + ROPE_SCALE + own * (4 * R) + 2 * R, key.zero + block, plain);
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

// Ask for rows of the tail, those of positions from `near` to `end`.
__device__ inline void prefetch_tail(const u16* key, const u16* value, int near, int end, int tail_tokens) {
    while (near < end) {
        const int row = near % tail_tokens, rows = min(end - near, tail_tokens - row);
        prefetch(key + row * R, rows * R * 2);
        prefetch(value + row * L, rows * L * 2);
        near += rows;
    }
}

// Where a thread is.
struct Place {
    char* shared;
    int warp, lane, g, t;  // the warp is one of its team
};

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
    const int lane = lane_id();
    const bool scores = threadIdx.x < SCORERS * 32;
    const int warp = threadIdx.x / 32 - (scores ? 0 : SCORERS);
    const Place at = {shared, warp, lane, lane / 4, lane % 4};
    if (CHAINED) await_inputs();
    const u64 row = (u64)seq * num_heads + head;
    const int position = positions[seq], near = visible[seq], far = min(near, position + 1);
    float *tops = (float*)(shared + TOPS), *sums = (float*)shared;  // these when the ring is read
    queries += row * (L + R);
    if (scores) leave_queries(at, tops, queries, heads);  // while positions are on their way
    // As in decode.cu: what starts soon fetches weights to L2, and a long read would drive them out again.
    if (CHAINED && !scores && (int)gridDim.x / rows * position < 8192) start_next();

    // Programs share the tiles, as many as there are shares. The last has the tail too, whose bytes are three to nine
    // times as many for each token.
    const int tiles = (far + TOKENS - 1) / TOKENS, tail_units = (tail_tokens * 4 + TOKENS - 1) / TOKENS;
    const int units = max(1, tiles + tail_units), share = (units + splits - 1) / splits;
    const int shares = (units + share - 1) / share;
    if (arrivals && split >= shares) return;
    const int begin = min(tiles, split * share), count = min(tiles, (split + 1) * share) - begin;
    const int tail_count = split == shares - 1 ? (tail_tokens + TOKENS - 1) / TOKENS : 0;
    const u64 tail = tail_count ? (u64)slots[seq] * slot_units * 16 : 0;
    const u16 *tail_keys = (const u16*)(key.tail + tail), *tail_values = (const u16*)(value.tail + tail);
    if (tail_count && threadIdx.x == SCORERS * 32) prefetch_tail(tail_keys, tail_values, near, position + 1, tail_tokens);

    // Tile k is begin + k; each lane of a gatherer looks up the block of what its warp brings of one of the next 32. What
    // would begin behind the last token is fetched from where that is.
    table += (u64)seq * table_stride;
    const u32 last = max(0, far - 1) / DRAWN * DRAWN;
    int blocks = 0;
    auto first_of = [&](u32 k) { return min((begin + k) * TOKENS + warp * DRAWN, last); };
    auto fetch_tile = [&](u32 k) {
        if (k % 32 == 0 && k + lane < count) blocks = table[first_of(k + lane) / BLOCK];
        u64 block = (u64)(u32)shuffle(blocks, k % 32) * (u32)block_units * 16;
        if (k < count) fetch(shared + k % STAGES * STAGE, key, value, block, first_of(k) % BLOCK, warp);
        end_group();
    };
    if (!scores) {
#pragma unroll 1
        for (int k = 0; k < STAGES - 1; k++) fetch_tile(k);
    }

    // Weights go from scorers to gatherers in one of two buffers, FULL of them. That it is READY means that it is empty
    // again, and that the tile is there which is scored meanwhile. The tail comes first, while tiles are on their way.
    const int all = tail_count + count;
    const bool alone = splits == 1 || arrivals && shares == 1;
    auto stage_of = [&](int tile) { return shared + tile % STAGES * STAGE; };
    if (scores) {
        Scorer w(at, tops, scale);
        auto far_of = [&](int tile) { return far - (begin + tile) * TOKENS; };
        for (int k = 0; k < tail_count; k++) {
            meet(READY + k % 2, ALL);
            w.add_tail(queries, heads, tail_keys, tail_values, k * TOKENS, position, near, tail_tokens, scale, k % 2);
            arrive(FULL + k % 2, ALL);
        }
        meet(BEGUN, ALL);
        if (AHEAD && count > 0) w.add_tile(stage_of(0), far_of(0), [] {});
#pragma unroll 1
        for (int k = tail_count; k < all; k++) {
            const int tile = k - tail_count;
            meet(READY + k % 2, ALL);
            auto leave = [&] {
                w.leave_tile(stage_of(tile), k % 2);
                arrive(FULL + k % 2, ALL);
            };
            if (AHEAD && tile + 1 < count) {
                w.add_tile(stage_of(tile + 1), far_of(tile + 1), leave);
            } else {
                if (!AHEAD) w.add_tile(stage_of(tile), far_of(tile), [] {});
                leave();
            }
        }
        if (CHAINED) start_next();  // all that is long is read
        __syncthreads();
        __syncthreads();
        if (!alone && w.warp == 0 && w.t == 0)
            for (int h = 0; h < 2; h++) {
                const int own = w.g + 8 * h;
                float total = 0;
                for (int i = 0; i < GATHERERS; i++) total += sums[(i * HEADS + own) * SUMS + GROUPS];
                if (own < heads) lse[(row + own) * splits + split] = w.m[h] + log2_of(fmaxf(total, 1e-37f));
            }
    } else {
        Gatherer w(at);
        auto say_ready = [&](int k) {
            if (k < all) arrive(READY + k % 2, ALL);
        };
        await_groups<STAGES - 2>();
        arrive(BEGUN, ALL);
        await_groups<STAGES - 2 - AHEAD>();
        say_ready(0);
        await_groups<STAGES - 3 - AHEAD>();
        say_ready(1);
        for (int k = 0; k < all; k++) {
            meet(FULL + k % 2, ALL);
            const int tile = k - tail_count;
            if (tile >= 0) fetch_tile(tile - 1 + STAGES);  // to where all have left the tile before
            w.rescale(k % 2);
            if (tile < 0) w.add_tail(tail_values, k * TOKENS, tail_tokens, k % 2);
            else w.add_tile(stage_of(tile), k % 2);
            await_groups<STAGES - 3 - AHEAD>();
            say_ready(k + 2);
        }
        await_groups<0>();
        __syncthreads();  // the ring is read
        w.leave_sums(sums);
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int own = w.g + 8 * h;
            if (own < heads)
                w.finish(sums, h, [&](int channel, const Floats4& x) {
                    if (alone)
                        *(Words2*)(out + (row + own) * L + channel) = {
                            round_pair<BF16>(x.x[0], x.x[1]), round_pair<BF16>(x.x[2], x.x[3])
                        };
                    else
                        *(Floats4*)(partial + ((row + own) * splits + split) * L + channel) = x;
                });
        }
    }
    if (alone || !arrivals) return;
    __syncthreads();  // sums are read
    merge_splits<L>(arrivals + blockIdx.x, (float*)shared, partial, lse, out, row, heads, splits, shares);
}
