// Decode attention over integer codes: keys per channel, values per token. `cuda_decode.py` says what is computed.
//
// Each warp has tiles of up to 64 tokens to itself and keeps its own maximum, sum and output; warps meet once, at the
// end, and then the programs that share a sequence. Codes come to shared memory as they lie in a block and go from there
// to the tensor cores' operands without a conversion: the bits of a code, alone in an fp16, are the subnormal number
// code · 2^-24, exactly (times 2^(BITS · part) for higher parts of a byte), and a product takes the order of what it sums
// from whoever loads it:
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
constexpr int OUT_ROW = D + 8;                       // floats of a head's output, where warps meet
constexpr int HEADS = 8 * COLUMNS;                   // of a KV head, with padding
constexpr int OUT = (OUT_ROW + 2) * HEADS;           // floats of a warp where warps meet
constexpr int RING = STAGES * STAGE;
extern "C" __constant__ const int shared_bytes = WARPS * (RING > 4 * OUT ? RING : 4 * OUT);

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
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM) paged_decode(
    const u16* query,    // [n, heads, D]
    void* out,           // [n, heads, D]
    float* partial,      // [n, heads, splits, D], with splits
    float* lse,          // [n, heads, splits]
    int* arrivals,       // [n, kv_heads] zeros, before and after; or null: another kernel merges
    const Index* table,
    const Index* positions,
    const Index* visible,
    const Index* slots,
    Stream key,
    Stream value,
    float scale,               // to the exponent of 2
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
    const int seq = blockIdx.x / kv_heads, head = blockIdx.x % kv_heads, split = blockIdx.y, splits = gridDim.y;
    const int warp = threadIdx.x / 32, lane = lane_id();
    // Tables and what is packed were there before the kernel in front: fetching it begins while that still runs.
    const int position = positions[seq], far = visible[seq];
    const int first = max(0, position + 1 - window), near = max(first, far);

    // Programs share the tiles, as many as there are shares. The last has the tail too (what is packed by the block has its
    // newest token there), which weighs as much as a tile for each 16 tokens.
    const u64 row = (u64)blockIdx.x * group_heads;
    const int start = first / TOKENS, tiles = far > first ? (far + TOKENS - 1) / TOKENS - start : 0;
    const int units = tiles + (position - near) / 16 + 1, share = (units + splits - 1) / splits;
    const int shares = (units + share - 1) / share;
    if (arrivals && split >= shares) return;
    const int begin = start + min(tiles, split * share), end = start + min(tiles, (split + 1) * share);

    // Tile k of this warp is begin + warp + k · WARPS; each lane looks up the block of one of the next 32.
    table += (u64)seq * table_stride;
    int blocks = 0;
    char* stages = shared + warp * RING;
    auto fetch_tile = [&](int k) {
        int tile = begin + warp + k * WARPS;
        if (k % 32 == 0) {
            int own = tile + lane * WARPS;
            blocks = own < end ? table[own / TILES] : 0;
        }
        u64 block = (u64)shuffle(blocks, k % 32) * block_units * 16;
        if (tile < end) fetch(stages + k % STAGES * STAGE, key, value, block, head, tile % TILES);
        // Not before: a product fetches its weights to L2 as it starts, and a long read would drive them out again.
        else if (CHAINED) start_next();
        end_group();
    };
    for (int k = 0; k < STAGES; k++) fetch_tile(k);
    const bool has_tail = split == shares - 1 && near <= position;  // a row that is nobody's has nothing
    const u64 tail = has_tail ? (u64)slots[seq] * slot_units * 16 + (u64)head * tail_tokens * D * 2 : 0;
    if (CHAINED) {
        if (has_tail && threadIdx.x < 2) {
            int row = near % tail_tokens, rows = min(position + 1 - near, tail_tokens - row);
            prefetch((threadIdx.x ? value : key).tail + tail + row * D * 2, rows * D * 2);
        }
        await_inputs();
    }

    Warp w;
    w.g = lane / 4, w.t = lane % 4;
    query += row * D;
    for (int n = 0; n < COLUMNS; n++) {
        const u16* own = query + (n * 8 + w.g) * D;
        float x[D / 16][4], top = 1e-20f;
        for (int word = 0; word < K_WORDS; word++)
            for (int part = 0; part < K_PARTS; part++) {
                u32 pairs[2] = {};
                if (n * 8 + w.g < group_heads) read<8>(pairs, own + key_channel(w.t, word) + part * K_ROW);
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
            for (int j = 0; j < 2; j++) w.q[n][step][j] = round_pair<false>(x[step][2 * j] * factor, x[step][2 * j + 1] * factor);
        }
        for (int e = 0; e < 2; e++) {
            w.to_log2[n][e] = shuffle(top, (2 * w.t + e) * 4) * scale * power_of_2(24 - boost(K_BITS));
            w.m[n][e] = -1e30f;
        }
        for (int j = 0; j < 4; j++) {
            w.sums[n][j] = 0;
            for (int i = 0; i < D / 16; i++) w.acc[n][i][j] = 0;
        }
    }

    // The tail comes first, while tiles are on their way.
    if (has_tail)
        for (int from = near + warp * 16; from <= position; from += WARPS * 16)
            w.add_tail(query, (const u16*)(key.tail + tail), (const u16*)(value.tail + tail), from, position, tail_tokens,
                       group_heads, scale);

    for (int k = 0; begin + warp + k * WARPS < end; k++) {
        await_groups<STAGES - 1>();
        w.add_tile(stages + k % STAGES * STAGE, first - (begin + warp + k * WARPS) * TOKENS);
        __syncwarp();
        fetch_tile(k + STAGES);
    }

    // Warps meet.
    await_groups<0>();
    __syncthreads();
    float* meeting = (float*)shared;
    float* mine = meeting + warp * OUT;
    for (int n = 0; n < COLUMNS; n++)
        for (int e = 0; e < 2; e++) {
            int row = n * 8 + 2 * w.t + e;
            if (w.g == 0) {
                mine[HEADS * OUT_ROW + row] = w.m[n][e];
                mine[HEADS * OUT_ROW + HEADS + row] = w.sums[n][2 + e];
            }
            float zeros[GROUPS];
            for (int group = 0; group < GROUPS; group++) zeros[group] = shuffle(w.sums[n][e], group * 4 + w.t);
            for (int piece = 0; piece < V_ROW / PIECE; piece++)
                for (int b = 0; b < V_WIDTH / 2; b++)
                    for (int part = 0; part < V_PARTS; part++) {
                        int group = (part * V_ROW + piece * PIECE) / V_GROUP;
                        for (int y = 0; y < 2; y++)
                            mine[row * OUT_ROW + w.channel_of(piece, b, part) + y] =
                                w.acc[n][w.tile_of(piece, b, part)][2 * y + e] * power_of_2(24 - V_BITS * part) + zeros[group];
                    }
        }
    __syncthreads();
    const bool alone = splits == 1 || arrivals && shares == 1;
    for (int at = threadIdx.x * 2; at < group_heads * D; at += WARPS * 64) {
        int column = at / D, channel = at % D;
        float top = -1e30f, total = 0, sum[2] = {};
        for (int i = 0; i < WARPS; i++) top = fmaxf(top, meeting[i * OUT + HEADS * OUT_ROW + column]);
        for (int i = 0; i < WARPS; i++) {
            const float* other = meeting + i * OUT;
            float part = exp2_of(other[HEADS * OUT_ROW + column] - top);
            total += part * other[HEADS * OUT_ROW + HEADS + column];
            for (int y = 0; y < 2; y++) sum[y] += part * other[column * OUT_ROW + channel + y];
        }
        total = fmaxf(total, 1e-37f);
        for (int y = 0; y < 2; y++) sum[y] /= total;
        if (alone) {
            *(u32*)((u16*)out + (row + column) * D + channel) = round_pair<BF16>(sum[0], sum[1]);
        } else {
            float* to = partial + ((row + column) * splits + split) * D + channel;
            to[0] = sum[0];
            to[1] = sum[1];
            if (channel == 0) lse[(row + column) * splits + split] = top + log2_of(total);
        }
    }
    if (alone || !arrivals) return;

    merge_splits<D>(arrivals + blockIdx.x, (float*)shared, partial, lse, out, row, group_heads, splits, shares);
}
