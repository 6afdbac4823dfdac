// Decode attention over latents of integer codes (MLA, absorbed): a latent is key and value at once.
// `cuda_mla_decode.py` says what is computed.
//
// A program has 16 query heads, the rows of both products, and walks over tiles of tokens. Some of its warps score, in
// teams that have a tile each, in turn: a warp has a run of its tokens, with all of their channels, and leaves their
// weights in shared memory. The others gather: each has a span of channels, of all tokens of every tile. So outputs stay
// in registers, and a warp has neighbours that are a tile ahead or behind, at work on something else. A latent comes to
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
constexpr int AHEAD = STAGES > 3 ? 3 : 2;  // from a tile that has been gathered to one that must have come by then
constexpr int CHAINS = PARTS < 2 ? 2 : PARTS;  // sums of a chunk: a product waits long for what it adds to
constexpr int CHUNKS_AT_ONCE = 1, STEPS_AT_ONCE = 2;  // of loops that are unrolled so far
constexpr int PREFETCH = 0;

// A stage of the ring, and what else is in shared memory.
constexpr int ROPE = TOKENS * ROW;
constexpr int SCALE = ROPE + TOKENS * ROPE_ROW;
constexpr int ZERO = SCALE + TOKENS * 2 * GROUPS;
constexpr int ROPE_SCALE = ZERO + TOKENS * 2 * GROUPS;  // of the blocks of DRAWN tokens: scales and zeros by channel
constexpr int STAGE = ROPE_SCALE + (ROPE_BITS == 8 ? GATHERERS * 4 * R : 0);
constexpr int QUERY = STAGES * STAGE;                   // operands of the first product, [step][lane]
constexpr int WEIGHTS = QUERY + QUERY_STEPS * 512;      // of the second, [2][step][lane]
constexpr int ALPHAS = WEIGHTS + 2 * STEPS * 512;       // [2][head]: what outputs so far are multiplied by
constexpr int UNITS = ALPHAS + 2 * HEADS * 4;           // [head]: powers of 2 that queries are divided by
constexpr int MAXIMA = UNITS + HEADS * 4;               // [head]: of the exponents of 2 so far, at least
constexpr int TOPS = MAXIMA + HEADS * 4;                // [team][warp][head]
constexpr int SUMS = GROUPS + 1;                        // where gatherers meet, [gatherer][head]: Σ p∘zero by group, Σ p
extern "C" __constant__ const int shared_bytes = TOPS + TEAMS * SCORERS * HEADS * 4;

static_assert(RUN % 16 == 0 && BLOCK % RUN == 0 && BLOCK % DRAWN == 0 && SPAN % 32 == 0);
static_assert(RUN % DRAWN == 0 || DRAWN % RUN == 0);
static_assert(STAGE % 128 == 0 && STAGES >= 3 && WARPS == TEAMS * SCORERS + GATHERERS);

// Barriers: of all that score; of a team of them; and of a team with gatherers or with the other team, at which one side
// only arrives: what it says of an item, a tile or a part of the tail.
constexpr int QUERIES = 1, SCORING = 2, FULL = 4, EMPTY = 6, TURN = 8, LOADED = 10;
constexpr int TEAM = SCORERS * 32, ALL_TEAMS = TEAMS * TEAM, BOTH = TEAM + GATHERERS * 32;

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

    // Scales of a group, of 16 tokens: those of tokens 2t and 2t + 1, and of the two that are 8 behind.
    __device__ inline const char* scales_of(const char* stage, int step, int group) {
        return stage + SCALE + step * 256 + (group * 4 + t) * 8;
    }
};

// Leave `queries` [heads, L + R] in shared memory as operands, divided by powers of 2 near their largest, in `units`.
__device__ inline void leave_queries(Place at, float* units, const u16* queries, int heads) {
    // Nothing is done before all is asked for: what a program waits for here, it waits for alone.
    constexpr int STRIDE = TEAMS * SCORERS, OWN = (HEADS + STRIDE - 1) / STRIDE, OWN_STEPS = (QUERY_STEPS + STRIDE - 1) / STRIDE;
    auto row_of = [&](int head) { return queries + min(head, heads - 1) * (L + R); };
    float largest[OWN];
    u32 words[OWN_STEPS][2][2];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        largest[i] = 1e-20f;
#pragma unroll
        for (int channel = at.lane * 8; channel < L + R; channel += 256) {
            u32 pairs[4];
            read<16>(pairs, row_of(at.warp + i * STRIDE) + channel);
            for (u32 pair : pairs)
                for (int e = 0; e < 2; e++) largest[i] = fmaxf(largest[i], fabsf(widen<BF16>((u16)(pair >> 16 * e))));
        }
    }
#pragma unroll
    for (int i = 0; i < OWN_STEPS; i++)
        for (int h = 0; h < 2; h++)
            read<8>(words[i][h], row_of(at.g + 8 * h) + query_channel(min(i * STRIDE + at.warp, QUERY_STEPS - 1), at.t));
    for (int i = 0; i < OWN; i++) {
        for (int mask = 1; mask < 32; mask *= 2) largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], mask));
        if (at.lane == 0 && at.warp + i * STRIDE < HEADS)
            units[at.warp + i * STRIDE] = __uint_as_float(__float_as_uint(largest[i]) & 0x7f800000);
    }
    if (threadIdx.x < HEADS) *(float*)(at.shared + MAXIMA + threadIdx.x * 4) = -1e30f;
    meet(QUERIES, ALL_TEAMS);
#pragma unroll
    for (int i = 0; i < OWN_STEPS; i++) {
        const int step = i * STRIDE + at.warp;
        if (step >= QUERY_STEPS) break;
        const bool exact = ROPE_BITS == 16 && step >= L / 16;
        u32 operand[4];
        for (int h = 0; h < 2; h++) {
            float factor = power_of_2(QUERY_BOOST) * __uint_as_float(0x7f000000 - __float_as_uint(units[at.g + 8 * h])), x[4];
            if (step < L / 16) factor *= power_of_2(-BITS * (step % PARTS));
            for (int e = 0; e < 4; e++) x[e] = widen<BF16>((u16)(words[i][h][e / 2] >> e % 2 * 16)) * factor;
            for (int j = 0; j < 2; j++)
                operand[2 * j + h] = exact ? round_pair<BF16>(x[2 * j], x[2 * j + 1]) : round_pair<false>(x[j], x[j + 2]);
        }
        *(Words4*)(at.shared + QUERY + step * 512 + at.lane * 16) = {operand[0], operand[1], operand[2], operand[3]};
    }
    meet(QUERIES, ALL_TEAMS);
}

// A warp that scores.
struct Scorer : Place {
    int team;
    u32 query_sums[4];   // queries summed by group of channels, twice: as fp16, and what that leaves
    float to_log2[2];    // what a score takes to the exponent of 2, of heads g and g + 8
    float s[OCTETS][4];  // scores of this warp's run: columns 2t and 2t + 1 of heads g and g + 8

    __device__ inline Scorer(Place at, int team, float scale) : Place(at), team(team) {
        for (int h = 0; h < 2; h++) to_log2[h] = *head_of(UNITS, h) * scale * power_of_2(24 - QUERY_BOOST);
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

    // What an array of shared memory has of head g + 8h.
    __device__ inline float* head_of(int array, int h) { return (float*)(shared + array) + g + 8 * h; }

    __device__ inline void read_query(u32 (&to)[4], int step) {
        read<16>(to, shared + QUERY + step * 512 + lane * 16);
    }

    // Leave scales of this warp's run by pairs of tokens, as `scales_of` finds them, where they have come by token.
    __device__ inline void turn_scales(char* stage) {
        u32 pairs[RUN / 16][2];
        char* own = stage + SCALE + warp * RUN * 16;
        for (int i = 0; i < RUN / 16; i++) read_transposed(pairs[i], own + (16 * i + lane % 16) * 16);
        __syncwarp();
        for (int i = 0; i < RUN / 16; i++) *(Words2*)(own + i * 256 + lane * 8) = {pairs[i][0], pairs[i][1]};
        __syncwarp();
    }

    // Scores by rope keys, and what zeros add.
    __device__ inline void add_rope(const char* stage) {
        const int row = warp * RUN + g;
        float offset[4] = {}, offsets[OCTETS][4] = {};  // of all tokens, and of each
        u32 keys[OCTETS][ROPE_ROW / 16];
#pragma unroll
        for (int o = 0; o < OCTETS; o++) {
            for (int i = 0; i < ROPE_ROW / 64; i++) {
                const char* from = stage + ROPE + (row + 8 * o) * ROPE_ROW;
                read<16>(keys[o] + 4 * i, from + (i * 64 + t * 16 ^ rope_swizzle(row)));
            }
            u32 zero[2];
            read<4>(zero, stage + ZERO + (row + 8 * o) * 16 + 4 * t);
            zero[1] = zero[0];
            multiply_add<false>(offsets[o], query_sums, zero);
        }
#pragma unroll
        for (int step = 0; step < R / 16; step++) {
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
                    multiply_add<false>(s[o], operand, pairs);
                } else {
                    pairs[0] = keys[o][2 * step], pairs[1] = keys[o][2 * step + 1];
                    multiply_add<BF16>(offsets[o], operand, pairs);
                }
        }
        for (int o = 0; o < OCTETS; o++)
            for (int j = 0; j < 4; j++) s[o][j] += (offset[j] + offsets[o][j]) * power_of_2(-24);
    }

    __device__ inline void score(const char* stage) {
        const int row = warp * RUN + g;
        for (auto& octet : s)
            for (float& x : octet) x = 0;
        add_rope(stage);
#pragma unroll CHUNKS_AT_ONCE
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const char* codes = stage + row * ROW + (chunk * 64 + t * 16 ^ swizzle(row));
            u32 words[OCTETS][4];
            float sum[CHAINS][OCTETS][4] = {};
            for (int o = 0; o < OCTETS; o++) read<16>(words[o], codes + 8 * o * ROW);
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
            for (int part = 0; part < PARTS; part++)
                for (int o = 0; o < OCTETS; o += 2) {
                    u32 pairs[2];  // of tokens 2t and 2t + 1 of both octets
                    read<8>(pairs, scales_of(stage, warp * OCTETS / 2 + o / 2, part * CHUNKS + chunk));
                    for (int j = 0; j < 8; j++) {
                        const float scale = widen<false>((u16)(pairs[j / 4] >> j % 2 * 16));
                        s[o + j / 4][j % 4] += sum[part][o + j / 4][j % 4] * scale;
                        if (PARTS < 2) s[o + j / 4][j % 4] += sum[1][o + j / 4][j % 4] * scale;
                    }
                }
        }
    }

    template <bool BFLOAT> __device__ inline void leave_weights(
        const float (&unit)[2], const float (&m)[2], int buffer
    ) {
        for (int o = 0; o < OCTETS; o += 2) {
            u32 p[4];
            for (int j = 0; j < 4; j++) {
                const float *two = s[o + j / 2] + j % 2 * 2, shift = boost(BITS) - m[j % 2];
                p[j] = round_pair<BFLOAT>(exp2_of(fmaf(two[0], unit[j % 2], shift)), exp2_of(fmaf(two[1], unit[j % 2], shift)));
            }
            const int step = buffer * STEPS + (warp * OCTETS + o) / 2;
            *(Words4*)(shared + WEIGHTS + step * 512 + lane * 16) = {p[0], p[1], p[2], p[3]};
        }
    }

    // Leave weights of these scores. They stay at most 1: where one of a warp of the team is above the maximum, all make
    // them a second time.
    template <bool BFLOAT> __device__ inline void weigh(const float (&unit)[2], int buffer) {
        float top[2], m[2], alpha[2] = {1, 1};
        for (int h = 0; h < 2; h++) {
            m[h] = *head_of(MAXIMA, h);
            top[h] = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
            for (int o = 1; o < OCTETS; o++) top[h] = fmaxf(top[h], fmaxf(s[o][2 * h], s[o][2 * h + 1]));
            top[h] *= unit[h];
        }
        leave_weights<BFLOAT>(unit, m, buffer);
        if (any_member(SCORING + team, TEAM, top[0] > m[0] || top[1] > m[1])) {
            const int own = TOPS + team * SCORERS * HEADS * 4;
            for (int h = 0; h < 2; h++) {
                for (int mask = 1; mask < 4; mask *= 2) top[h] = fmaxf(top[h], shuffle_xor(top[h], mask));
                if (t == 0) *head_of(own + warp * HEADS * 4, h) = top[h];
            }
            meet(SCORING + team, TEAM);
            for (int h = 0; h < 2; h++) {
                for (int i = 0; i < SCORERS; i++) top[h] = fmaxf(top[h], *head_of(own + i * HEADS * 4, h));
                float raised = top[h] > m[h] ? top[h] + HEADROOM : m[h];
                alpha[h] = exp2_of(m[h] - raised);
                m[h] = raised;
            }
            leave_weights<BFLOAT>(unit, m, buffer);
        }
        if (warp == 0 && t == 0)
            for (int h = 0; h < 2; h++) {
                *head_of(ALPHAS + buffer * HEADS * 4, h) = alpha[h];
                *head_of(MAXIMA, h) = m[h];
            }
    }

    // Tokens of the tile from `far` on are not seen.
    __device__ inline void add_tile(char* stage, int far) {
        turn_scales(stage);
        score(stage);
        if (warp * RUN + RUN > far)
            for (int o = 0; o < OCTETS; o++)
                for (int e = 0; e < 2; e++)
                    if (warp * RUN + 8 * o + 2 * t + e >= far) s[o][e] = s[o][2 + e] = __uint_as_float(0xff800000);  // -∞
    }

    // TOKENS rows of the tail from `first` on, at the model's precision; what is before position `near` is not seen. Warps
    // have 16 of them in turn, so that all have some of a short tail.
    __device__ inline void add_tail(
        const u16* queries, int heads, const u16* key, const u16* value, int first, int position, int near,
        int tail_tokens
    ) {
        const u16 *low = queries + min(g, heads - 1) * (L + R), *high = queries + min(g + 8, heads - 1) * (L + R);
        const int newest = position % tail_tokens;  // position p lies in row p mod tail_tokens
        auto seen = [&](int row) {
            return row < tail_tokens && newest - row + (row > newest ? tail_tokens : 0) <= position - near;
        };
#pragma unroll
        for (int o = 0; o < OCTETS; o += 2) {
            const int from = first + (o / 2 * SCORERS + warp) * 16;
            float sum[2][4] = {};
            if (any_lane(seen(from + lane % 16)))
#pragma unroll 6
                for (int channel = 8 * t; channel < L + R; channel += 32) {
                    u32 a[2][4];
                    read<16>(a[0], low + channel);
                    read<16>(a[1], high + channel);
                    for (int i = 0; i < 2; i++) {
                        const int row = min(from + 8 * i + g, tail_tokens - 1);
                        u32 words[4];
                        read<16>(words, channel < L ? value + row * L + channel : key + row * R + channel - L);
                        for (int j = 0; j < 4; j += 2) {
                            u32 rows[4] = {a[0][j], a[1][j], a[0][j + 1], a[1][j + 1]}, columns[2] = {words[j], words[j + 1]};
                            multiply_add<BF16>(sum[i], rows, columns);
                        }
                    }
                }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++)
                    s[o + i][j] = seen(from + 8 * i + 2 * t + j % 2) ? sum[i][j] : __uint_as_float(0xff800000);  // -∞
        }
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
#pragma unroll STEPS_AT_ONCE
        for (int i = 0; i < STEPS; i++) {
            u32 p[4], weights[PIECES][PARTS][4];
            read<16>(p, shared + WEIGHTS + (buffer * STEPS + i) * 512 + lane * 16);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                for (int part = 0; part < PARTS; part++) {
                    u32 scale[2];
                    read<8>(scale, scales_of(stage, i, group_of(piece * 4, part)));
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
#pragma unroll 1
        for (int i = 0; i < steps; i++) {
            const int from = first + i * 16, step = i % SCORERS * (OCTETS / 2) + i / SCORERS;  // as scorers have them
            u32 weights[4];
            read<16>(weights, shared + WEIGHTS + (buffer * STEPS + step) * 512 + lane * 16);
            if (!any_lane(weights[0] | weights[1] | weights[2] | weights[3])) continue;
            if (i % GATHERERS == warp) add_total<BF16>(weights);
            const u16* rows[4];
            for (int j = 0; j < 4; j++)
                rows[j] = value + min(from + 2 * t + j % 2 + j / 2 * 8, tail_tokens - 1) * L + 2 * g;
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

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) latent_decode(
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
    const bool scores = threadIdx.x < ALL_TEAMS;
    const int warp = threadIdx.x / 32 - (scores ? 0 : TEAMS * SCORERS);
    const Place at = {shared, warp, lane, lane / 4, lane % 4};
    if (CHAINED) await_inputs();
    const u64 row = (u64)seq * num_heads + head;
    const int position = positions[seq], near = visible[seq], far = min(near, position + 1);
    const u64 tail = (u64)slots[seq] * slot_units * 16;
    const u16 *tail_keys = (const u16*)(key.tail + tail), *tail_values = (const u16*)(value.tail + tail);
    queries += row * (L + R);
    if (scores) leave_queries(at, (float*)(shared + UNITS), queries, heads);  // while positions are on their way
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
    if (tail_count && threadIdx.x == ALL_TEAMS) prefetch_tail(tail_keys, tail_values, near, position + 1, tail_tokens);

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
        if (PREFETCH && k % 32 + PREFETCH < 32 && k + PREFETCH < count) {
            block = (u64)(u32)shuffle(blocks, k % 32 + PREFETCH) * (u32)block_units * 16;
            const u32 row = first_of(k + PREFETCH) % BLOCK;
            if (lane == 0) prefetch(value.codes + block + row * ROW, DRAWN * ROW);
            if (lane == 1) prefetch(key.codes + block + row * ROPE_ROW, DRAWN * ROPE_ROW);
            if (lane == 2) prefetch(value.scale + block + row * (2 * GROUPS), DRAWN * 2 * GROUPS);
            if (lane == 3) prefetch(value.zero + block + row * (2 * GROUPS), DRAWN * 2 * GROUPS);
        }
        end_group();
    };
    if (!scores) {
#pragma unroll 1
        for (int k = 0; k < STAGES - 1; k++) fetch_tile(k);
    }

    // Items are parts of the tail, and then tiles, which are on their way meanwhile. Teams score one each, in turn, when it
    // is LOADED. They leave weights in one of two buffers, one team after the other, where the buffer is EMPTY: then it is
    // FULL.
    const int items = tail_count + count;
    const bool alone = splits == 1 || arrivals && shares == 1;
    float* sums = (float*)shared;  // when the ring is read
    auto stage_of = [&](int tile) { return shared + tile % STAGES * STAGE; };
    if (scores) {
        const int team = warp / SCORERS;
        Scorer w({shared, warp % SCORERS, lane, at.g, at.t}, team, scale);
        const float tail_unit[2] = {scale, scale};
#pragma unroll 1
        for (int k = team; k < items; k += TEAMS) {
            const int tile = k - tail_count;
            meet(LOADED + k % 3, BOTH);
            if (tile < 0)
                w.add_tail(queries, heads, tail_keys, tail_values, k * TOKENS, position, near, tail_tokens);
            else
                w.add_tile(stage_of(tile), far - (begin + tile) * TOKENS);
            if (k >= 2) meet(EMPTY + k % 2, BOTH);
            if (TEAMS > 1 && k > 0) meet(TURN + k % 2, ALL_TEAMS);
            if (tile < 0) w.weigh<BF16>(tail_unit, k % 2);
            else w.weigh<false>(w.to_log2, k % 2);
            if (TEAMS > 1 && k + 1 < items) arrive(TURN + (k + 1) % 2, ALL_TEAMS);
            arrive(FULL + k % 2, BOTH);
        }
        if (CHAINED) start_next();  // all that is long is read
        __syncthreads();
        __syncthreads();
        if (!alone && warp == 0 && w.t == 0)
            for (int h = 0; h < 2; h++) {
                const int own = w.g + 8 * h;
                float total = 0;
                for (int i = 0; i < GATHERERS; i++) total += sums[(i * HEADS + own) * SUMS + GROUPS];
                if (own < heads) lse[(row + own) * splits + split] = *w.head_of(MAXIMA, h) + log2_of(fmaxf(total, 1e-37f));
            }
    } else {
        Gatherer w(at);
        auto say_loaded = [&](int k) {
            if (k < items) arrive(LOADED + k % 3, BOTH);
        };
        await_groups<STAGES - 2>();
        say_loaded(0);
        await_groups<STAGES - 3>();
        say_loaded(1);
        if constexpr (AHEAD > 2) {
            await_groups<STAGES - 4>();
            say_loaded(2);
        }
        for (int k = 0; k < items; k++) {
            meet(FULL + k % 2, BOTH);
            const int tile = k - tail_count;
            if (tile >= 0) fetch_tile(tile - 1 + STAGES);  // to where all have left the tile before
            w.rescale(k % 2);
            if (tile < 0) w.add_tail(tail_values, k * TOKENS, tail_tokens, k % 2);
            else w.add_tile(stage_of(tile), k % 2);
            if (k + 2 < items) arrive(EMPTY + k % 2, BOTH);
            await_groups<STAGES - 1 - AHEAD>();
            say_loaded(k + AHEAD);
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
