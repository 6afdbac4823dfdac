// Tiles of keys and values as the model computes them.
//
//   scores   [16 tokens, 8 heads]    += keys [16 tokens, 16 channels] · q [16 channels, 8 heads]
//   outputs  [16 channels, 8 heads]  += values [16 channels, 16 tokens] · p [16 tokens, 8 heads]

constexpr bool TAIL = false;
constexpr int TOKENS = BLOCK < TILE ? BLOCK : TILE;  // of a tile
constexpr int STEPS = TOKENS / 16;
constexpr int ROW = 2 * D;  // bytes of a token
constexpr int VALUES = TOKENS * ROW;
constexpr int STAGE = 2 * VALUES;
static_assert(D % 64 == 0 && TOKENS % 16 == 0);

// 16 bytes of a token lie where eight tokens' have eight places.
__device__ inline int place(int token, int chunk) { return token * ROW + (chunk ^ token % 8) * 16; }

__device__ inline void fetch(char* to, Stream key, Stream value, u64 block, int head, int tile) {
    u64 first = block + ((u64)head * BLOCK + tile * TOKENS) * ROW;
    auto placed = [](int at, int own) { return place((at + own) / ROW, own % ROW / 16); };
    copy<VALUES>(to, key.codes + first, placed);
    copy<VALUES>(to + VALUES, value.codes + first, placed);
}

struct Warp : Found {
    u32 q[COLUMNS][D / 16][2];
    float to_log2[COLUMNS][2];  // what a score takes to the exponent of 2

    // A row of which nothing was found yet.
    __device__ inline void begin(const u16* query, int group_heads, float scale) {
        for (int n = 0; n < COLUMNS; n++) {
            for (int i = 0; i < D / 16; i++)
                for (int h = 0; h < 2; h++) {
                    q[n][i][h] = 0;
                    if (n * 8 + g < group_heads) read<4>(&q[n][i][h], query + (n * 8 + g) * D + i * 16 + h * 8 + 2 * t);
                }
            to_log2[n][0] = to_log2[n][1] = scale;
        }
        clear();
    }

    // The tile at position `from` of a sequence of which `first` to `position` are seen.
    __device__ inline void add_unit(
        const char* stage, int from, int first, int position, Tail, const u16* query, int group_heads, float scale
    ) {
        const int lane = lane_id(), token = lane % 8, matrix = lane / 8;
        float s[COLUMNS][STEPS][4] = {}, largest[COLUMNS][2];
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                u32 keys[4];
                read_matrices(keys, stage + place(i * 16 + matrix % 2 * 8 + token, 2 * c + matrix / 2));
                for (int n = 0; n < COLUMNS; n++) multiply_add<BF16>(s[n][i], keys, q[n][c]);
            }
        if (from < first || from + TOKENS > position + 1)
            for (int i = 0; i < STEPS; i++)
                for (int h = 0; h < 2; h++) {
                    int at = from + i * 16 + h * 8 + g;
                    if (at < first || at > position)
                        for (int n = 0; n < COLUMNS; n++) s[n][i][2 * h] = s[n][i][2 * h + 1] = -1.0f / 0.0f;
                }
        for (int n = 0; n < COLUMNS; n++)
            for (int e = 0; e < 2; e++) {
                largest[n][e] = fmaxf(s[n][0][e], s[n][0][2 + e]);
                for (int i = 1; i < STEPS; i++) largest[n][e] = fmaxf(largest[n][e], fmaxf(s[n][i][e], s[n][i][2 + e]));
            }
        raise(largest, to_log2);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            u32 p[COLUMNS][2];
            for (int n = 0; n < COLUMNS; n++) {
                for (int h = 0; h < 2; h++)
                    p[n][h] = transpose(round_pair<BF16>(
                        exp2_of(s[n][i][2 * h] * to_log2[n][0] - m[n][0]),
                        exp2_of(s[n][i][2 * h + 1] * to_log2[n][1] - m[n][1])
                    ));
                constexpr u32 one = BF16 ? 0x3f803f80 : 0x3c003c00;
                u32 rows[4] = {0, one, 0, one};
                multiply_add<BF16>(sums[n], rows, p[n]);
            }
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                u32 values[4];
                read_transposed(values, stage + VALUES + place(i * 16 + matrix / 2 * 8 + token, 2 * c + matrix % 2));
                for (int n = 0; n < COLUMNS; n++) multiply_add<BF16>(acc[n][c], values, p[n]);
            }
        }
    }

    // The row's outputs [heads, D].
    __device__ inline void finish(u16* out, int group_heads) {
        for (int n = 0; n < COLUMNS; n++) {
            float factor[2];
            for (int e = 0; e < 2; e++) factor[e] = 1 / fmaxf(sums[n][2 + e], 1e-37f);
            for (int c = 0; c < D / 16; c++)
                for (int h = 0; h < 2; h++) {
                    u32 pair = transpose(round_pair<BF16>(acc[n][c][2 * h] * factor[0], acc[n][c][2 * h + 1] * factor[1]));
                    if (n * 8 + g < group_heads) *(u32*)(out + (n * 8 + g) * D + c * 16 + h * 8 + 2 * t) = pair;
                }
        }
    }
};
