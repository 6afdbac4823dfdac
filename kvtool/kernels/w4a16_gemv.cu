// Products of a few rows with 4-bit weights, bound by the rate at which weights are read. `w4a16_gemv.py` says what is
// computed, and how the work is cut.
//
// Weights are the rows of the tensor cores' first operand, x the columns of the second. A word has two products' pairs of
// OFFSET + code (`w4a16.cuh`):
//
//   sums [16 outputs, 8 rows] += (OFFSET + codes) [16 outputs, 16 columns] · x [16 columns, 8 rows]
//
// and a product of ones with x gives what OFFSET and the zero of a group have added, to be taken away in fp32 before the
// scale.
//
// A program has `tiles` of OUTPUTS outputs, of which it uses `lines` of each 16. The chunks of columns of all its tiles,
// one tile's after the other's, are its warps' to share, a run of them each: a warp's reads are STAGES chunks ahead, in a
// ring of its own, whatever tile they are of, and warps meet once, at the end. All multiprocessors read the same x at once,
// for which the L2 cache is slow: a multiprocessor's own cache must hold it.
//
// A lane is 4g + t. Outputs 2g and 2g + 1 of 16 are rows g and g + 8 of a product, which takes its columns in any order:
// each t has READ neighbouring bytes of a chunk. A chunk stays within one group of GROUP columns.

constexpr int THREADS = 32 * WARPS, OUTPUTS = 16 * TILES;
constexpr int READ = GROUP % 128 == 0 ? 16 : GROUP % 64 == 0 ? 8 : 4;
constexpr int CHUNK = 8 * READ, WORDS = READ / 4;  // columns, and of each lane words of 8 codes
constexpr int RUNS = CHUNK / 32, PIECES = CHUNK / 8;  // of a chunk: runs of columns, and of a row of x 16 bytes each
constexpr int CODES_BYTES = OUTPUTS * CHUNK / 2, GRID_BYTES = OUTPUTS * 4;  // of a chunk, with scales and zeros
constexpr int STAGE_BYTES = CODES_BYTES + GRID_BYTES + ROWS * CHUNK * 2;
constexpr int MEETING_ROW = OUTPUTS + 4;  // floats of a row of x where warps meet
static_assert(TILES <= 2 && ROWS <= 8);   // lanes t have scales and zeros of a tile each, and all g a row
extern "C" __constant__ const int shared_bytes = ROOM;

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM) w4a16_gemv(
    const u16* x,       // [rows, depth]
    const char* weight, // [outputs, depth / 2]
    const u16* scales,  // [depth / GROUP, outputs]
    const u16* zeros,
    const u16* bias,    // [outputs], or null
    u16* out,           // [rows, outputs]
    int rows,           // ROWS at most
    int outputs,        // even
    int depth,
    int most_tiles,     // of a program
    int lines           // even
) {
    extern __shared__ Words4 dynamic[];
    const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    const int chunks = depth / CHUNK, of_tile = TILES * lines, first = blockIdx.x * most_tiles * of_tile;
    const int tiles = min(most_tiles, (outputs - first + of_tile - 1) / of_tile);
    auto share = [&](int warp) { return warp * tiles * chunks / WARPS; };  // where it begins
    const int begin = share(warp), end = share(warp + 1);

    // What a lane fetches of weights it reads again by itself, but for scales and zeros.
    char* const ring = (char*)dynamic + warp * (STAGES * STAGE_BYTES);
    int ahead = begin, its_chunk = begin % chunks, its_tile = begin / chunks;
    const char* codes_of[TILES];
    const u16* grid;
    auto find = [&] {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const u32 output = min(first + (its_tile * TILES + i) * lines + min(2 * g, lines - 2), outputs - 2);
            codes_of[i] = weight + (u64)output * (depth / 2) + its_chunk * (4 * READ) + t * READ;
            if (i == 0 || t / 2 == i) grid = (t % 2 ? zeros : scales) + output;
        }
    };
    find();
    auto fetch = [&](int stage) {
        char* const to = ring + stage * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++)
                copy_async_once<READ>(to + ((i * 2 + h) * 32 + lane) * READ, codes_of[i] + h * (depth / 2));
            codes_of[i] += 4 * READ;
        }
        const u32 group = its_chunk / (GROUP / CHUNK);
        if (t < 2 * TILES)
            copy_async_cached<4>(to + CODES_BYTES + t / 2 * 64 + g * 8 + t % 2 * 4, grid + group * (u32)outputs);
        ahead++;
        if (++its_chunk == chunks) its_chunk = 0, its_tile++, find();
    };
    // Lanes that read x together find their pieces in all banks.
    const u16* const pieces = x + (u64)(lane / PIECES) * depth + lane % PIECES * 8;
    const int run = t * READ / 16, row_of_x = g % ROWS, odd = READ == 16 && ROWS > 1;
    auto fetch_x = [&](int stage, int chunk) {
        char* const to = ring + stage * STAGE_BYTES + CODES_BYTES + GRID_BYTES;
        const u16* from = pieces + chunk * CHUNK;
#pragma unroll
        for (int i = 0; i < ROWS; i += 32 / PIECES, from += (u64)(32 / PIECES) * depth) {
            const int row = i + lane / PIECES, q = lane % 4 ^ row % 2 * odd, place = q * RUNS + lane % PIECES / 4;
            if (row < rows) copy_async_cached<16>(to + (row * PIECES + place) * 16, from);
        }
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
        if (ahead < end) fetch(stage);
        end_group();
    }
    if (CHAINED) {
        start_next();
        await_inputs();
    }
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
        if (begin + stage < end) fetch_x(stage, (begin + stage) % chunks);
        end_group();
    }

    const u32 upper = UPPER<BF16> | depth >> 31;  // in a register: nobody knows before that there are columns
    float total[TILES][4] = {};
    auto add = [&](const char* stage) {
        float sums[TILES][4] = {}, ones[4] = {};
        u32 codes[TILES][2][WORDS];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) read<READ>(codes[i][h], stage + ((i * 2 + h) * 32 + lane) * READ);
        const char* its_x = stage + CODES_BYTES + GRID_BYTES + (row_of_x * PIECES + run) * 16 + t * READ % 16;
#pragma unroll
        for (int s = 0; s < 2; s++) {
            u32 pairs[2 * WORDS];  // of x
#pragma unroll
            for (int j = 0; j < 2; j++)
                read<READ>(pairs + j * WORDS, its_x + ((2 * s + j) ^ row_of_x % 2 * odd) * (RUNS * 16));
#pragma unroll
            for (int m = 0; m < WORDS; m++) {
                const u32 b[2] = {pairs[2 * m], pairs[2 * m + 1]};
                const u32 rows_of_ones[4] = {ONES<BF16>, ONES<BF16>, ONES<BF16>, ONES<BF16>};
                multiply_add<BF16>(ones, rows_of_ones, b);
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    u32 a[4];
                    for (int h = 0; h < 2; h++)
                        for (int e = 0; e < 2; e++)
                            a[2 * e + h] = code_pair<BF16>(codes[i][h][(2 * m + e) % WORDS], s, (2 * m + e) / WORDS, upper);
                    multiply_add<BF16>(sums[i], a, b);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            u32 grid[2];  // scales and zeros of two outputs
            read<8>(grid, stage + CODES_BYTES + i * 64 + g * 8);
            for (int h = 0; h < 2; h++) {
                const float scale = widen<BF16>(grid[0] >> 16 * h), zero = OFFSET<BF16> + widen<BF16>(grid[1] >> 16 * h);
                for (int e = 0; e < 2; e++) total[i][2 * h + e] += scale * (sums[i][2 * h + e] - zero * ones[e]);
            }
        }
    };
    // Sums of a warp and a tile are numbered by both, added: each begins where another has ended.
    float* const meeting = (float*)((char*)dynamic + WARPS * STAGES * STAGE_BYTES);
    auto keep = [&](int tile) {
        float* to = meeting + (warp + tile) * rows * MEETING_ROW + 2 * g;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int row = 2 * t + j % 2;
                if (row < rows) to[row * MEETING_ROW + i * 16 + j / 2] = total[i][j];
                total[i][j] = 0;
            }
    };
    int tile = begin / chunks, chunk = begin % chunks;
    for (int index = begin, stage = 0; index < end; index++) {
        await_groups<STAGES - 1>();
        add(ring + stage * STAGE_BYTES);
        __syncwarp();  // all have read what is replaced
        if (ahead < end) fetch_x(stage, its_chunk), fetch(stage);
        end_group();
        if (++stage == STAGES) stage = 0;
        if (++chunk == chunks) keep(tile++), chunk = 0;
    }
    if (chunk && begin < end) keep(tile);

    __syncthreads();
    for (int at = threadIdx.x; at < rows * tiles * of_tile; at += THREADS) {
        const int row = at / (tiles * of_tile), output = at % (tiles * of_tile), tile = output / of_tile;
        if (first + output >= outputs) continue;
        const int place = output % of_tile / lines * 16 + output % of_tile % lines;
        float sum = bias ? widen<BF16>(bias[first + output]) : 0;
        for (int warp = 0; warp < WARPS; warp++)
            if (max(share(warp), tile * chunks) < min(share(warp + 1), (tile + 1) * chunks))
                sum += meeting[((warp + tile) * rows + row) * MEETING_ROW + place];
        out[(u64)row * outputs + first + output] = (u16)round_pair<BF16>(sum, 0);
    }
}
