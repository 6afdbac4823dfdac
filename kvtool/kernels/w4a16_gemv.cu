// Products of a few rows with 4-bit weights, bound by the rate at which weights are read. `w4a16_gemv.py` says what is
// computed.
//
// Weights are the rows of the tensor cores' first operand, x the columns of the second. A word has two products' pairs of
// OFFSET + code (`w4a16.cuh`):
//
//   sums [16 outputs, 8 rows] += (OFFSET + codes) [16 outputs, 16 columns] · x [16 columns, 8 rows]
//
// and a product of ones with x gives what OFFSET and the zero of a group have added, to be taken away in fp32 before the
// scale. Warps share the columns of a program's outputs, a chunk each in turn, and meet once, at the end.
//
// A lane is 4g + t. A product takes its columns in any order: each t has READ neighbouring bytes of a chunk, so that what
// a lane reads of weights and of x lies side by side. A chunk stays within one group of GROUP columns.

constexpr int READ = GROUP % 128 == 0 ? 16 : GROUP % 64 == 0 ? 8 : 4;
constexpr int CHUNK = 8 * READ, WORDS = READ / 4, BOTH = WORDS == 1 ? 1 : 2;  // columns, and of each lane words of 8 codes
constexpr int OUTPUTS = 16 * TILES, ROWS = 8 * COLUMNS;
constexpr int MEETING_ROW = OUTPUTS + 4;  // floats of a row of x where warps meet
extern "C" __constant__ const int shared_bytes = WARPS * ROWS * MEETING_ROW * 4;

struct Chunk {
    u32 codes[TILES][2][WORDS];
    u16 scale[TILES][2], zero[TILES][2];
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM) w4a16_gemv(
    const u16* x,       // [rows, depth]
    const char* weight, // [outputs, depth / 2]
    const u16* scales,  // [depth / GROUP, outputs]
    const u16* zeros,
    const u16* bias,    // [outputs], or null
    u16* out,           // [rows, outputs]
    int rows,
    int outputs,
    int depth
) {
    extern __shared__ Words4 dynamic[];
    const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * OUTPUTS, chunks = depth / CHUNK;
    if (CHAINED) {
        if (threadIdx.x == 0)
            prefetch(weight + (u64)first * (depth / 2), (u32)min(outputs - first, OUTPUTS) * (depth / 2));
        for (int i = threadIdx.x; i < depth / GROUP * TILES; i += WARPS * 32) {
            const u64 at = (u64)(i / TILES) * outputs + min(first + i % TILES * 16, outputs - 1);
            prefetch_sector(scales + at), prefetch_sector(zeros + at);
        }
    }

    const char* codes_of[TILES][2];
    u32 lines[TILES][2];
    for (int i = 0; i < TILES; i++)
        for (int h = 0; h < 2; h++) {
            u32 line = min(first + i * 16 + h * 8 + g, outputs - 1);
            codes_of[i][h] = weight + (u64)line * (depth / 2) + t * READ;
            lines[i][h] = line;
        }
    auto fetch = [&](Chunk& chunk, int index) {
        if (index >= chunks) return;
        for (int i = 0; i < TILES; i++)
            for (int h = 0; h < 2; h++) {
                read_once<READ>(chunk.codes[i][h], codes_of[i][h] + index * (4 * READ));
                u32 group = index / (GROUP / CHUNK) * outputs + lines[i][h];
                chunk.scale[i][h] = scales[group];
                chunk.zero[i][h] = zeros[group];
            }
    };
    Chunk held[STAGES];
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) fetch(held[stage], warp + stage * WARPS);

    const int column = t * READ / 16 * 32 + t * READ % 16 / 2;  // the first of a lane, of a chunk
    const u16* rows_of_x[COLUMNS];  // columns of a product that are no rows of x repeat its last one
    for (int n = 0; n < COLUMNS; n++) rows_of_x[n] = x + (u64)min(n * 8 + g, rows - 1) * depth + column;
    float total[TILES][COLUMNS][4] = {};
    auto add = [&](const Chunk& chunk, int index) {
        float sums[TILES][COLUMNS][4] = {}, ones[COLUMNS][4] = {};
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int half = 0; half < WORDS; half += BOTH) {
                u32 pairs[COLUMNS][2][BOTH];  // of x
                for (int n = 0; n < COLUMNS; n++)
                    for (int j = 0; j < 2; j++)
                        read<4 * BOTH>(pairs[n][j], rows_of_x[n] + index * CHUNK + s * 16 + j * 8 + half * 2);
#pragma unroll
                for (int word = 0; word < BOTH; word++) {
                    u32 b[COLUMNS][2];
                    for (int n = 0; n < COLUMNS; n++) {
                        for (int j = 0; j < 2; j++) b[n][j] = pairs[n][j][word];
                        const u32 rows_of_ones[4] = {ONES<BF16>, ONES<BF16>, ONES<BF16>, ONES<BF16>};
                        multiply_add<BF16>(ones[n], rows_of_ones, b[n]);
                    }
                    for (int i = 0; i < TILES; i++) {
                        u32 a[4];
                        for (int h = 0; h < 2; h++)
                            for (int j = 0; j < 2; j++)
                                a[2 * j + h] = code_pair<BF16>(chunk.codes[i][h][half + word], s, j);
                        for (int n = 0; n < COLUMNS; n++) multiply_add<BF16>(sums[i][n], a, b[n]);
                    }
                }
            }
        for (int i = 0; i < TILES; i++)
            for (int h = 0; h < 2; h++) {
                float scale = widen<BF16>(chunk.scale[i][h]), zero = OFFSET<BF16> + widen<BF16>(chunk.zero[i][h]);
                for (int n = 0; n < COLUMNS; n++)
                    for (int e = 0; e < 2; e++)
                        total[i][n][2 * h + e] += scale * (sums[i][n][2 * h + e] - zero * ones[n][e]);
            }
    };
    if (CHAINED) {
        start_next();
        await_inputs();
    }
    for (int index = warp; index < chunks;)
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++, index += WARPS)
            if (index < chunks) {
                add(held[stage], index);
                fetch(held[stage], index + STAGES * WARPS);
            }

    // Warps meet.
    float* meeting = (float*)dynamic;
    for (int i = 0; i < TILES; i++)
        for (int n = 0; n < COLUMNS; n++)
            for (int j = 0; j < 4; j++)
                meeting[(warp * ROWS + n * 8 + 2 * t + j % 2) * MEETING_ROW + i * 16 + j / 2 * 8 + g] = total[i][n][j];
    __syncthreads();
    for (int at = threadIdx.x; at < rows * OUTPUTS; at += WARPS * 32) {
        int row = at / OUTPUTS, output = at % OUTPUTS;
        if (first + output >= outputs) continue;
        float sum = bias ? widen<BF16>(bias[first + output]) : 0;
        for (int i = 0; i < WARPS; i++) sum += meeting[(i * ROWS + row) * MEETING_ROW + output];
        out[(u64)row * outputs + first + output] = (u16)round_pair<BF16>(sum, 0);
    }
}
