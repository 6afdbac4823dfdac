// Decode attention over integer codes: keys per channel, values per token. `cuda_decode.py` says what is computed.
//
// What a sequence has read for one KV head is a row of units: tiles of up to 64 packed tokens, then 16 tokens of the tail
// each. The units of all rows, one row behind the other, are dealt evenly to all warps of a launch, whatever the lengths
// of sequences; so a warp has the end of one row, some whole rows, and the beginning of one. Whole rows it writes by itself;
// of the others warps put together what they have found, first those of a program, then programs.
//
// Codes come to shared memory as they lie in a block and go from there to the tensor cores' operands without a conversion:
// the bits of a code, alone in an fp16, are the subnormal number code · 2^-24, exactly (times 2^(BITS · part) for higher
// parts of a byte), and a product takes the order of what it sums from whoever loads it:
//
//   scores   [16 tokens, 8 heads]    += keys [16 tokens, 16 channels] · (q∘scale) [16 channels, 8 heads]
//   outputs  [16 channels, 8 heads]  += values [16 channels, 16 tokens] · (p∘scale) [16 tokens, 8 heads]
//
// A lane is 4g + t. Channels are dealt to the t of keys in runs of a row's bytes; tokens to the t of values in runs of
// RUN, so that what a lane reads of either, or of scales, lies side by side.

constexpr int K_PARTS = 8 / K_BITS, V_PARTS = 8 / V_BITS;  // codes in a byte
constexpr int TOKENS = BLOCK < TILE ? BLOCK : TILE;        // of a tile
constexpr int TILES = BLOCK / TOKENS;                      // of a block
constexpr int RUN = TOKENS / 4;                            // tokens of each t
constexpr int STEPS = TOKENS / 16;
constexpr int GROUPS = D / V_GROUP;
constexpr int PIECE = D / V_PARTS < V_GROUP ? D / V_PARTS : V_GROUP;  // bytes of a row of values that share scales
constexpr int K_ROW = D / K_PARTS, V_ROW = D / V_PARTS;               // bytes of a token
constexpr int K_WORDS = K_ROW / 16;                                   // of a lane, of each row of keys
constexpr int V_WIDTH = PIECE / 8;                                    // bytes of a lane, of each piece of a token
constexpr int CHUNK = K_ROW < 64 ? K_ROW / 4 : 16;                    // bytes of keys that a lane reads at once

// Rows lie in shared memory so that lanes that read at the same time find different banks.
constexpr int K_SKEW = K_ROW == 32 ? 64 : K_ROW == 16 ? 32 : 0, V_SKEW = 32;  // bytes behind each run of rows
constexpr int K_CODES = 0;
constexpr int K_SCALE = K_CODES + TOKENS * K_ROW + 4 * K_SKEW;
constexpr int K_ZERO = K_SCALE + 2 * D;
constexpr int V_CODES = K_ZERO + 2 * D;
constexpr int V_SCALE = V_CODES + TOKENS * V_ROW + 4 * V_SKEW;
constexpr int V_ZERO = V_SCALE + 2 * TOKENS * GROUPS;
constexpr int STAGE = V_ZERO + 2 * TOKENS * GROUPS;
constexpr int RING = STAGES * STAGE;
constexpr int FRAGMENT = COLUMNS * (D / 16 + 2) * 128;  // floats of what a warp has found of a row
constexpr int OWN = RING > 4 * FRAGMENT ? RING : 4 * FRAGMENT;
constexpr int OPEN = WARPS * OWN;                    // where warps say which row they leave open
extern "C" __constant__ const int shared_bytes = OPEN + 16 * (WARPS / 4 + 3);

static_assert(D % 64 == 0 && V_WIDTH >= 2 && STAGE % 16 == 0);

// How far chunk `at` + `own` is pushed by skews of `skew` bytes behind each `period` bytes. `at` is a constant.
__device__ inline int skewed(int at, int own, int period, int skew) {
    return at + own + (period % 512 == 0 ? at / period : at / period + own / period) * skew;
}

__device__ inline void fetch(char* to, Stream key, Stream value, u64 block, int head, int tile) {
    u64 row = (u64)head * BLOCK + tile * TOKENS;
    copy<TOKENS * K_ROW>(to + K_CODES, key.codes + block + row * K_ROW, [](int at, int own) {
        return K_ROW >= 128 ? at + (own ^ own / K_ROW % 2 * 64) : skewed(at, own, RUN * K_ROW, K_SKEW);
    });
    auto plain = [](int at, int own) { return at + own; };
    copy<2 * D>(to + K_SCALE, key.scale + block + head * (2 * D), plain);
    copy<2 * D>(to + K_ZERO, key.zero + block + head * (2 * D), plain);
    copy<TOKENS * V_ROW>(to + V_CODES, value.codes + block + row * V_ROW, [](int at, int own) {
        return skewed(at, own, RUN * V_ROW, V_SKEW);
    });
    copy<2 * TOKENS * GROUPS>(to + V_SCALE, value.scale + block + row * (2 * GROUPS), plain);
    copy<2 * TOKENS * GROUPS>(to + V_ZERO, value.zero + block + row * (2 * GROUPS), plain);
}

// First channel of word `w` of the keys of lane t.
__device__ inline int key_channel(int t, int w) { return w / 4 * 64 + t * CHUNK + w % 4 * 4; }

// One fp16 of each of 4 tokens [token][GROUPS], as two pairs.
__device__ inline void four_tokens(u32 (&to)[2], const char* from, int group) {
    if constexpr (GROUPS == 1) {
        read<8>(to, from);
    } else if constexpr (GROUPS == 2) {
        u32 x[4];
        read<16>(x, from);
        u32 selector = group ? 0x7632 : 0x5410;
        to[0] = permute(x[0], x[1], selector);
        to[1] = permute(x[2], x[3], selector);
    } else {
        const u16* x = (const u16*)from + group;
        to[0] = x[0] | (u32)x[GROUPS] << 16;
        to[1] = x[2 * GROUPS] | (u32)x[3 * GROUPS] << 16;
    }
}

struct Warp {
    int g, t;
    u32 q[COLUMNS][D / 16][2];     // queries over their maximum, times 2^(boost - K_BITS · part)
    float to_log2[COLUMNS][2];     // what a score takes to the exponent of 2
    float m[COLUMNS][2];           // the largest so far, at least
    float acc[COLUMNS][D / 16][4]; // outputs times 2^(V_BITS · part - 24)
    float sums[COLUMNS][4];        // Σ p∘zero of group g mod GROUPS, and Σ p

    // Make room for scores up to `largest` (before `unit`): p stays at most 1.
    __device__ inline void raise(const float (&largest)[COLUMNS][2], const float (&unit)[COLUMNS][2]) {
        bool above = false;
        for (int n = 0; n < COLUMNS; n++)
            for (int e = 0; e < 2; e++) above |= largest[n][e] * unit[n][e] > m[n][e];
        if (!any_lane(above)) return;
        for (int n = 0; n < COLUMNS; n++)
            for (int e = 0; e < 2; e++) {
                float top = largest[n][e];
                for (int mask = 4; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
                top *= unit[n][e];
                float raised = top > m[n][e] ? top + HEADROOM : m[n][e], alpha = exp2_of(m[n][e] - raised);
                m[n][e] = raised;
                for (int i = 0; i < D / 16; i++) {
                    acc[n][i][e] *= alpha;
                    acc[n][i][2 + e] *= alpha;
                }
                sums[n][e] *= alpha;
                sums[n][2 + e] *= alpha;
            }
    }

    // `masked`: tokens before this one of the tile are not seen.
    __device__ inline void add_tile(const char* stage, int masked) {
        float s[COLUMNS][STEPS][4];
        u32 qs[COLUMNS][D / 16][2];
        {
            float offset[COLUMNS][K_PARTS][4] = {};
            // What rounding takes from q∘scale is given back as if all codes were the middle one: so most of it does not
            // move the scores of one block against another's.
            constexpr u32 middle = (14 + K_BITS << 10) * 0x10001u, middles[4] = {middle, middle, middle, middle};
#pragma unroll
            for (int w = 0; w < K_WORDS; w++)
#pragma unroll
                for (int part = 0; part < K_PARTS; part++) {
                    int at = 2 * (key_channel(t, w) + part * K_ROW), step = w * K_PARTS + part;
                    u32 scale[2], zero[2];
                    read<8>(scale, stage + K_SCALE + at);
                    read<8>(zero, stage + K_ZERO + at);
                    u32 rows[4] = {zero[0], zero[0], zero[1], zero[1]};
                    for (int n = 0; n < COLUMNS; n++) {
                        u32 lost[2];
                        for (int j = 0; j < 2; j++) {
                            qs[n][step][j] = multiply(q[n][step][j], scale[j]);
                            lost[j] = fused<false>(q[n][step][j], scale[j], negative(qs[n][step][j]));
                        }
                        multiply_add<false>(offset[n][part], rows, q[n][step]);
                        multiply_add<false>(offset[n][part], middles, lost);
                    }
                }
            for (int n = 0; n < COLUMNS; n++)
                for (int e = 0; e < 2; e++) {
                    float sum = 0;
                    for (int part = 0; part < K_PARTS; part++) sum += offset[n][part][e] * power_of_2(K_BITS * part - 24);
                    for (int i = 0; i < STEPS; i++) s[n][i][e] = s[n][i][2 + e] = sum;
                }
        }
        const int swizzle = K_ROW >= 128 ? g % 2 * 64 : 0;
        const char* keys = stage + K_CODES + g / 2 * (RUN * K_ROW + K_SKEW) + g % 2 * K_ROW + t * CHUNK;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            u32 words[2][K_WORDS];
            for (int h = 0; h < 2; h++)
                for (int w = 0; w < K_WORDS; w += 4)
                    read<CHUNK>(words[h] + w, keys + (4 * i + 2 * h) * K_ROW + (w * 16 ^ swizzle));
#pragma unroll
            for (int w = 0; w < K_WORDS; w++) {
                u32 first[2], second[2];
                for (int h = 0; h < 2; h++) {
                    first[h] = permute(words[h][w], 0, 0x4140);
                    second[h] = permute(words[h][w], 0, 0x4342);
                }
#pragma unroll
                for (int part = 0; part < K_PARTS; part++) {
                    constexpr u32 all = K_BITS == 8 ? 0xffffffff : 0;
                    u32 mask = code_mask(K_BITS, part) | all;
                    u32 codes[4] = {first[0] & mask, first[1] & mask, second[0] & mask, second[1] & mask};
                    for (int n = 0; n < COLUMNS; n++) multiply_add<false>(s[n][i], codes, qs[n][w * K_PARTS + part]);
                }
            }
        }

        if (masked > 0)
            for (int i = 0; i < STEPS; i++)
                for (int h = 0; h < 2; h++)
                    if (g / 2 * RUN + 4 * i + 2 * h + g % 2 < masked)
                        for (int n = 0; n < COLUMNS; n++) s[n][i][2 * h] = s[n][i][2 * h + 1] = -1.0f / 0.0f;
        float largest[COLUMNS][2];
        for (int n = 0; n < COLUMNS; n++)
            for (int e = 0; e < 2; e++) {
                largest[n][e] = fmaxf(s[n][0][e], s[n][0][2 + e]);
                for (int i = 1; i < STEPS; i++) largest[n][e] = fmaxf(largest[n][e], fmaxf(s[n][i][e], s[n][i][2 + e]));
            }
        raise(largest, to_log2);

        const char* values = stage + V_CODES + t * (RUN * V_ROW + V_SKEW) + g * V_WIDTH;
        const char *scales = stage + V_SCALE + t * (RUN * 2 * GROUPS), *zeros = stage + V_ZERO + t * (RUN * 2 * GROUPS);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            u32 p[COLUMNS][2];
            for (int n = 0; n < COLUMNS; n++) {
                float shift[2];
                for (int e = 0; e < 2; e++) shift[e] = boost(V_BITS) - m[n][e];
                for (int h = 0; h < 2; h++)
                    p[n][h] = transpose(round_pair<false>(
                        exp2_of(s[n][i][2 * h] * to_log2[n][0] + shift[0]),
                        exp2_of(s[n][i][2 * h + 1] * to_log2[n][1] + shift[1])
                    ));
            }
            constexpr u32 ones = 0x3c003c00;
            u32 zero[2];
            four_tokens(zero, zeros + i * (8 * GROUPS), g % GROUPS);
            u32 rows[4] = {zero[0], ones, zero[1], ones};
            for (int n = 0; n < COLUMNS; n++) multiply_add<false>(sums[n], rows, p[n]);

            u32 weights[COLUMNS][GROUPS][2];
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                u32 scale[2];
                four_tokens(scale, scales + i * (8 * GROUPS), group);
                for (int n = 0; n < COLUMNS; n++)
                    for (int h = 0; h < 2; h++) weights[n][group][h] = multiply(p[n][h], scale[h]);
            }
#pragma unroll
            for (int piece = 0; piece < V_ROW / PIECE; piece++) {
                u32 words[4][(V_WIDTH + 3) / 4];
                for (int j = 0; j < 4; j++) read<V_WIDTH>(words[j], values + (4 * i + j) * V_ROW + piece * PIECE);
#pragma unroll
                for (int b = 0; b < V_WIDTH / 2; b++) {
                    // Bytes 2b and 2b + 1 of two tokens: X Y X Y.
                    u32 pairs[2], ys[2];
                    for (int j = 0; j < 2; j++) {
                        pairs[j] = permute(words[2 * j][b / 2], words[2 * j + 1][b / 2], b % 2 ? 0x7632 : 0x5410);
                        ys[j] = pairs[j] >> 8;
                    }
#pragma unroll
                    for (int part = 0; part < V_PARTS; part++) {
                        u32 mask = code_mask(V_BITS, part);
                        u32 codes[4] = {pairs[0] & mask, ys[0] & mask, pairs[1] & mask, ys[1] & mask};
                        int group = (part * V_ROW + piece * PIECE) / V_GROUP;
                        for (int n = 0; n < COLUMNS; n++)
                            multiply_add<false>(acc[n][tile_of(piece, b, part)], codes, weights[n][group]);
                    }
                }
            }
        }
    }

    // Which rows of `acc` hold bytes 2b and 2b + 1 of a lane's piece, and the first of their channels.
    __device__ static constexpr int tile_of(int piece, int b, int part) {
        return (piece * (V_WIDTH / 2) + b) * V_PARTS + part;
    }
    __device__ inline int channel_of(int piece, int b, int part) {
        return part * V_ROW + piece * PIECE + g * V_WIDTH + 2 * b;
    }

    // 16 tokens of the tail, at the model's precision, from position `from` on; those behind `position` are not there.
    __device__ inline void add_tail(
        const u16* query, const u16* key, const u16* value, int from, int position, int tail_tokens, int group_heads,
        float scale
    ) {
        const int start = from % tail_tokens, seen = position - from;
        auto row_of = [&](int token) {
            int row = start + min(token, seen);
            return (row < tail_tokens ? row : row - tail_tokens) * D;
        };
        float s[COLUMNS][4] = {};
#pragma unroll
        for (int c = 0; c < D; c += 32) {
            u32 words[2][4];
            for (int h = 0; h < 2; h++) read<16>(words[h], key + row_of(g / 2 * 4 + 2 * h + g % 2) + c + 8 * t);
            for (int n = 0; n < COLUMNS; n++) {
                u32 heads[4] = {};
                if (n * 8 + g < group_heads) read<16>(heads, query + (n * 8 + g) * D + c + 8 * t);
                for (int j = 0; j < 4; j += 2) {
                    u32 rows[4] = {words[0][j], words[1][j], words[0][j + 1], words[1][j + 1]}, b[2] = {heads[j], heads[j + 1]};
                    multiply_add<BF16>(s[n], rows, b);
                }
            }
        }
        float unit[COLUMNS][2], largest[COLUMNS][2];
        for (int h = 0; h < 2; h++)
            if (g / 2 * 4 + 2 * h + g % 2 > seen)
                for (int n = 0; n < COLUMNS; n++) s[n][2 * h] = s[n][2 * h + 1] = -1.0f / 0.0f;
        for (int n = 0; n < COLUMNS; n++)
            for (int e = 0; e < 2; e++) {
                unit[n][e] = scale;
                largest[n][e] = fmaxf(s[n][e], s[n][2 + e]);
            }
        raise(largest, unit);
        u32 p[COLUMNS][2];
        for (int n = 0; n < COLUMNS; n++) {
            for (int h = 0; h < 2; h++)
                p[n][h] = transpose(round_pair<BF16>(
                    exp2_of(s[n][2 * h] * scale + boost(V_BITS) - m[n][0]),
                    exp2_of(s[n][2 * h + 1] * scale + boost(V_BITS) - m[n][1])
                ));
            constexpr u32 one = BF16 ? 0x3f803f80 : 0x3c003c00;
            u32 rows[4] = {0, one, 0, one};
            multiply_add<BF16>(sums[n], rows, p[n]);
        }
#pragma unroll
        for (int piece = 0; piece < V_ROW / PIECE; piece++)
#pragma unroll
            for (int b = 0; b < V_WIDTH / 2; b++)
#pragma unroll
                for (int part = 0; part < V_PARTS; part++) {
                    u32 x[4];
                    for (int j = 0; j < 4; j++) read<4>(x + j, value + row_of(4 * t + j) + channel_of(piece, b, part));
                    u32 rows[4] = {
                        permute(x[0], x[1], 0x5410), permute(x[0], x[1], 0x7632),
                        permute(x[2], x[3], 0x5410), permute(x[2], x[3], 0x7632),
                    };
                    for (int n = 0; n < COLUMNS; n++) {
                        float sum[4] = {};
                        multiply_add<BF16>(sum, rows, p[n]);
                        for (int j = 0; j < 4; j++)
                            acc[n][tile_of(piece, b, part)][j] += sum[j] * power_of_2(V_BITS * part - 24);
                    }
                }
    }

    // A row of which nothing was found yet.
    __device__ inline void begin(const u16* query, int group_heads, float scale) {
        for (int n = 0; n < COLUMNS; n++) {
            const u16* own = query + (n * 8 + g) * D;
            float x[D / 16][4], top = 1e-20f;
            for (int word = 0; word < K_WORDS; word++)
                for (int part = 0; part < K_PARTS; part++) {
                    u32 pairs[2] = {};
                    if (n * 8 + g < group_heads) read<8>(pairs, own + key_channel(t, word) + part * K_ROW);
                    for (int j = 0; j < 4; j++) {
                        float one = widen<BF16>((u16)(pairs[j / 2] >> j % 2 * 16));
                        x[word * K_PARTS + part][j] = one;
                        top = fmaxf(top, fabsf(one));
                    }
                }
            for (int mask = 1; mask < 4; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
            top = __uint_as_float((__float_as_uint(top) & 0x7f800000) + 0x800000);  // the next power of 2: no digit is lost
            for (int step = 0; step < D / 16; step++) {
                float factor = power_of_2(boost(K_BITS) - K_BITS * (step % K_PARTS)) / top;
                for (int j = 0; j < 2; j++) q[n][step][j] = round_pair<false>(x[step][2 * j] * factor, x[step][2 * j + 1] * factor);
            }
            for (int e = 0; e < 2; e++) to_log2[n][e] = shuffle(top, (2 * t + e) * 4) * scale * power_of_2(24 - boost(K_BITS));
        }
        clear();
    }

    __device__ inline void clear() {
        for (int n = 0; n < COLUMNS; n++) {
            m[n][0] = m[n][1] = -1e30f;
            for (int j = 0; j < 4; j++) {
                sums[n][j] = 0;
                for (int i = 0; i < D / 16; i++) acc[n][i][j] = 0;
            }
        }
    }

    // What was found of the row, for another warp: 16 bytes of each lane side by side.
    __device__ inline void give(float* fragment) {
        Floats4* to = (Floats4*)fragment + lane_id();
        for (int n = 0; n < COLUMNS; n++) {
            for (int i = 0; i < D / 16; i++, to += 32) *to = {acc[n][i][0], acc[n][i][1], acc[n][i][2], acc[n][i][3]};
            *to = {sums[n][0], sums[n][1], sums[n][2], sums[n][3]}, to += 32;
            *to = {m[n][0], m[n][1]}, to += 32;
        }
    }

    // And what another has found. `load` reads 16 bytes.
    template <typename Load> __device__ inline void take(const float* fragment, Load load) {
        const float* from = fragment + lane_id() * 4;
        for (int n = 0; n < COLUMNS; n++) {
            Floats4 tops = load(from + (D / 16 + 1) * 128);
            float mine[2], others[2];
            for (int e = 0; e < 2; e++) {
                float top = fmaxf(m[n][e], tops.x[e]);
                mine[e] = exp2_of(m[n][e] - top), others[e] = exp2_of(tops.x[e] - top);
                m[n][e] = top;
            }
            auto add = [&](float (&to)[4]) {
                Floats4 x = load(from);
                for (int j = 0; j < 4; j++) to[j] = to[j] * mine[j % 2] + x.x[j] * others[j % 2];
                from += 128;
            };
            for (int i = 0; i < D / 16; i++) add(acc[n][i]);
            add(sums[n]);
            from += 128;
        }
    }

    // The row's outputs [heads, D].
    __device__ inline void finish(u16* out, int group_heads) {
        for (int n = 0; n < COLUMNS; n++)
            for (int e = 0; e < 2; e++) {
                int column = n * 8 + 2 * t + e;
                float zeros[GROUPS], factor = 1 / fmaxf(sums[n][2 + e], 1e-37f);
                for (int group = 0; group < GROUPS; group++) zeros[group] = shuffle(sums[n][e], group * 4 + t);
                if (column >= group_heads) continue;
                for (int piece = 0; piece < V_ROW / PIECE; piece++)
                    for (int b = 0; b < V_WIDTH / 2; b++)
                        for (int part = 0; part < V_PARTS; part++) {
                            const float* own = acc[n][tile_of(piece, b, part)];
                            float zero = zeros[(part * V_ROW + piece * PIECE) / V_GROUP], unit = power_of_2(24 - V_BITS * part);
                            *(u32*)(out + column * D + channel_of(piece, b, part)) =
                                round_pair<BF16>((own[e] * unit + zero) * factor, (own[2 + e] * unit + zero) * factor);
                        }
            }
    }
};

// What a query reads of its sequence.
struct Reach {
    int first, near;  // position that is seen, and that is read from the tail
    int start, tiles; // of what is packed
    int units;

    // Keys per channel are packed by the block: the newest token is in a tail.
    __device__ inline Reach(int position, int visible, int window) {
        first = max(0, position + 1 - window);
        near = max(first, visible);
        start = first / TOKENS;
        tiles = visible > first ? (visible + TOKENS - 1) / TOKENS - start : 0;
        units = tiles + (position - near) / 16 + 1;
    }
};

// Sums over the lanes up to each.
__device__ inline int running_sum(int x) {
    for (int step = 1; step < 32; step *= 2) {
        int before = shuffle(x, lane_id() - step);
        if (lane_id() >= step) x += before;
    }
    return x;
}

// How many lanes hold no more than `x`, of sums that grow from lane to lane; 31 at most.
__device__ inline int lanes_up_to(int sum, int x) {
    int lanes = 0;
    for (int step = 16; step; step /= 2)
        if (shuffle(sum, lanes + step - 1) <= x) lanes += step;
    return lanes;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM) paged_decode(
    const u16* query,    // [n, heads, D]
    u16* out,            // [n, heads, D]
    float* fragments,    // [programs, 2 + WARPS, FRAGMENT], what is not put together yet
    int* arrivals,       // [programs] zeros, before and after
    const Index* table,
    const Index* positions,
    const Index* visible,
    const Index* slots,
    Stream key,
    Stream value,
    float scale,               // to the exponent of 2
    int n,
    int table_stride,
    int block_units,           // 16 bytes each, as slot_units
    int slot_units,
    int kv_heads,
    int group_heads,
    int tail_tokens,
    int window
) {
    extern __shared__ Words4 dynamic[];
    char* shared = (char*)dynamic;
    const int warp = threadIdx.x / 32, lane = lane_id(), program = blockIdx.x;

    // Tables and what is packed were there before the kernel in front: fetching it begins while that still runs. The units
    // of 32 sequences at a time, and where those of this warp begin and end.
    auto units_of = [&](int seq) {
        return seq < n ? Reach(positions[seq], visible[seq], window).units * kv_heads : 0;
    };
    int* sums = (int*)shared;
    const int chunks = (n + 31) / 32;
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
        int sum = running_sum(units_of(chunk * 32 + lane));
        if (lane == 31) sums[chunk] = sum;
    }
    __syncthreads();
    int total = 0;
    for (int chunk = 0; chunk < chunks; chunk++) total += sums[chunk];
    const int workers = min(total, (int)gridDim.x * WARPS), worker = program * WARPS + warp;
    if (program * WARPS >= workers) return;
    auto begin_of = [&](int worker) { return (int)((u64)total * min(worker, workers) / workers); };
    const int begin = begin_of(worker), end = begin_of(worker + 1);
    int sequence = 0, before = 0;  // of units that follow the first or are part of it; and the units in front of it
    while (sequence + 32 < n && before + sums[sequence / 32] <= begin) before += sums[sequence / 32], sequence += 32;
    {
        int sum = before + running_sum(units_of(sequence + lane)), skipped = lanes_up_to(sum, begin);
        before = skipped ? shuffle(sum, skipped - 1) : before;
        sequence += skipped;
    }
    __syncthreads();

    // Of one of the next 32 units each lane knows its row, the position where it begins (~ that, if in the tail), its block
    // (or slot of a tail), and how many units of its row follow and go in front.
    int looked = 0, row = 0, at = 0, block = 0, left = 0, passed = 0;
    auto look_ahead = [&](int from) {
        int own = sequence + lane < n ? sequence + lane : n - 1;
        int position = positions[own], near = visible[own];
        int sum = before + running_sum(sequence + lane < n ? Reach(position, near, window).units * kv_heads : 0);
        int unit = min(begin + from + lane, end - 1), index = lanes_up_to(sum, unit);
        int first = shuffle(sum, index - 1);
        if (!index) first = before;
        Reach reach(shuffle(position, index), shuffle(near, index), window);
        int seq = sequence + index, head = (unit - first) / reach.units;
        passed = unit - first - head * reach.units;
        left = reach.units - 1 - passed;
        row = seq * kv_heads + head;
        if (passed < reach.tiles) {
            at = (reach.start + passed) * TOKENS;
            block = table[(u64)seq * table_stride + at / BLOCK];
        } else {
            at = ~(reach.near + (passed - reach.tiles) * 16);
            block = slots[seq];
        }
        looked = from;
        sequence = shuffle(seq, 33 - STAGES);
        before = shuffle(first, 33 - STAGES);
    };
    char* own = shared + warp * OWN;
    auto fetch_unit = [&](int k) {
        int lane = k - looked, from = shuffle(at, lane), head = shuffle(row, lane) % kv_heads;
        u64 found = shuffle(block, lane);
        // Not before: a product fetches its weights to L2 as it starts, and a long read would drive them out again.
        if (begin + k >= end) {
            if (CHAINED) start_next();
        } else if (from >= 0) {
            fetch(own + k % STAGES * STAGE, key, value, found * block_units * 16, head, from % BLOCK / TOKENS);
        } else if (CHAINED && lane_id() < 2) {
            int start = ~from % tail_tokens;
            u64 rows = found * slot_units * 16 + ((u64)head * tail_tokens + start) * D * 2;
            prefetch((lane_id() ? value : key).tail + rows, min(16, tail_tokens - start) * D * 2);
        }
        end_group();
    };
    if (begin < end) look_ahead(0);
    for (int k = 0; k < STAGES; k++) fetch_unit(k);
    if (CHAINED) await_inputs();

    auto program_of = [&](int unit) { return (int)(((u64)(unit + 1) * workers - 1) / total) / WARPS; };
    auto fragment = [&](int program, int which) { return fragments + ((u64)program * (2 + WARPS) + which) * FRAGMENT; };
    auto load_shared = [](const float* from) { return *(const Floats4*)from; };
    auto load_global = [](const float* from) { return load_written4(from); };
    Warp w;
    w.g = lane / 4, w.t = lane % 4;
    int position = 0, first = 0, open_row = -1, open_first = 0, open_last = 0, closed_row = -1, closed_first = 0;
    bool begins = true;
    for (int k = 0; begin + k < end; k++) {
        const int place = k - looked, current = shuffle(row, place), from = shuffle(at, place);
        const u16* queries = query + (u64)current * group_heads * D;
        if (begins) {
            position = positions[current / kv_heads];
            first = max(0, position + 1 - window);
            w.begin(queries, group_heads, scale);
        }
        await_groups<STAGES - 1>();
        if (from >= 0) {
            w.add_tile(own + k % STAGES * STAGE, first - from);
        } else {
            u64 rows = (u64)shuffle(block, place) * slot_units * 16 + (u64)(current % kv_heads) * tail_tokens * D * 2;
            w.add_tail(queries, (const u16*)(key.tail + rows), (const u16*)(value.tail + rows), ~from, position,
                       tail_tokens, group_heads, scale);
        }
        const int follow = shuffle(left, place), precede = shuffle(passed, place);
        begins = follow == 0;
        open_row = -1;
        if (!begins) {
            if (begin + k + 1 == end) {
                open_row = current;
                open_first = program_of(begin + k - precede), open_last = program_of(begin + k + follow);
            }
        } else if (precede <= k) {
            w.finish(out + (u64)current * group_heads * D, group_heads);
        } else {
            closed_row = current, closed_first = program_of(begin + k - precede);
            w.give(fragment(program, 2 + warp));
        }
        __syncwarp();
        if (k + STAGES - looked == 32) look_ahead(k + 1);
        fetch_unit(k + STAGES);
    }

    // Warps meet: who ends a row, or is the last, takes what those before it have found of that row.
    await_groups<0>();
    int* opened = (int*)(shared + OPEN);
    int* met = opened + WARPS;  // [2, 3]: a row whose programs have all been here, and the first and last of them
    const bool leaves = warp == WARPS - 1 || worker + 1 >= workers;
    if (lane == 0) opened[warp] = open_row;
    if (threadIdx.x < 2) met[threadIdx.x * 3] = -1;
    if (open_row >= 0 && !leaves) w.give((float*)own);
    __syncthreads();
    auto gather = [&](int row, int from, int to) {
        for (int other = warp - 1; other >= 0 && opened[other] == row; other--)
            w.take((const float*)(shared + other * OWN), load_shared);
        if (from == to) {
            w.finish(out + (u64)row * group_heads * D, group_heads);
            return;
        }
        w.give(fragment(program, program == from));
        __threadfence();
        __syncwarp();
        if (lane == 0 && atomicAdd(arrivals + from, 1) == to - from) {
            arrivals[from] = 0;  // for the next kernel
            int* here = met + (program == to ? 0 : 3);
            here[0] = row, here[1] = from, here[2] = to;
        }
    };
    if (open_row >= 0 && leaves) gather(open_row, open_first, open_last);
    if (closed_row >= 0) {
        w.clear();
        w.take(fragment(program, 2 + warp), load_global);
        gather(closed_row, closed_first, program);
    }
    __syncthreads();

    // Programs meet: the last to arrive takes what all have found of a row.
    for (int which = 0; which < 2; which++) {
        const int row = met[which * 3], from = met[which * 3 + 1], to = met[which * 3 + 2];
        if (row < 0) continue;
        __threadfence();
        w.clear();
        for (int other = from + warp; other <= to; other += WARPS) w.take(fragment(other, other == from), load_global);
        w.give((float*)own);
        __syncthreads();
        if (warp == 0) {
            for (int other = 1; other < WARPS; other++) w.take((const float*)(shared + other * OWN), load_shared);
            w.finish(out + (u64)row * group_heads * D, group_heads);
        }
        __syncthreads();
    }
}
