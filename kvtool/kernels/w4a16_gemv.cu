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
// A program has `tiles` of OUTPUTS outputs, of which it uses `lines` of each 16, and reads 2 WIDTH columns of a tile at a
// time, a step. The steps of all its tiles, one tile's after the other's, are its warps' to share, a run of them each: a
// warp's reads are STAGES steps ahead, in a ring of its own, whatever tile they are of, and warps meet once, at the end.
//
// A lane is 4g + t. Outputs 2g and 2g + 1 of 16 are rows g and g + 8 of a product, which takes its columns in any order:
// each t has READ neighbouring bytes of a chunk. A chunk stays within one group of GROUP columns.

constexpr int THREADS = 32 * WARPS, OUTPUTS = 16 * TILES, ROWS = 8 * COLUMNS;
constexpr int READ = GROUP % 128 == 0 ? 16 : GROUP % 64 == 0 ? 8 : 4;
constexpr int CHUNK = 8 * READ, WORDS = READ / 4;  // columns, and of each lane words of 8 codes
constexpr int CHUNKS = 2 * WIDTH / CHUNK;          // of a step
constexpr int PIECES = WIDTH / 16, AT_ONCE = 32 / PIECES;  // of a line, of 16 bytes; lines that a warp asks for at once
constexpr int CODES_BYTES = OUTPUTS * WIDTH, PAIRS = CHUNKS * TILES;
constexpr int STAGE_BYTES = CODES_BYTES + PAIRS * 64;  // with scales and zeros
constexpr int MEETING_ROW = OUTPUTS + 4;               // floats of a row of x where warps meet
extern "C" __constant__ const int shared_bytes = ROOM;

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM) w4a16_gemv(
    const u16* x,       // [rows, depth]
    const char* weight, // [outputs, depth / 2]
    const u16* scales,  // [depth / GROUP, outputs]
    const u16* zeros,
    const u16* bias,    // [outputs], or null
    u16* out,           // [rows, outputs]
    int rows,
    int outputs,        // even
    int depth,
    int most_tiles,     // of a program
    int lines           // even
) {
    extern __shared__ Words4 dynamic[];
    const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    const int chunks = depth / CHUNK, steps = (chunks + CHUNKS - 1) / CHUNKS;
    const int of_tile = TILES * lines, first = blockIdx.x * most_tiles * of_tile;
    const int tiles = min(most_tiles, (outputs - first + of_tile - 1) / of_tile);
    auto share = [&](int warp) { return warp * tiles * steps / WARPS; };  // where it begins
    const int begin = share(warp), end = share(warp + 1);

    // What is to be fetched comes to the ring so that lanes of four neighbouring g find their bytes in all banks.
    char* const ring = (char*)dynamic + warp * (STAGES * STAGE_BYTES);
    const int line = lane / PIECES, piece = lane % PIECES;
    int ahead = begin, its_tile = begin / steps, its_step = begin % steps;
    auto fetch = [&](int stage) {
        if (ahead < end) {
            char* const to = ring + stage * STAGE_BYTES;
            const int at = its_step * CHUNKS, left = its_step * PIECES + piece < depth / 32 ? min(lines, 16) : 0;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const int output = first + (its_tile * TILES + i) * lines;
                const char* from = weight + (u64)(output + line) * (depth / 2) + (its_step * PIECES + piece) * 16;
#pragma unroll
                for (int j = 0; j < 16; j += AT_ONCE, from += (u64)AT_ONCE * (depth / 2)) {
                    const int of = j + line, slot = of % 2 * 8 + of / 2, place = PIECES < 8 ? piece : piece ^ of / 2 % 2 * 4;
                    if (of < left && output + of < outputs) copy_async<16>(to + (i * 16 + slot) * WIDTH + place * 16, from);
                }
            }
#pragma unroll
            for (int j = 0; j < PAIRS; j += 2) {
                const int of = j + t / 2, chunk = at + of / TILES;
                const int output = first + (its_tile * TILES + of % TILES) * lines + 2 * g;
                if (of < PAIRS && chunk < chunks && 2 * g < lines && output < outputs)
                    copy_async<4>(to + CODES_BYTES + of * 64 + g * 8 + t % 2 * 4,
                                  (t % 2 ? zeros : scales) + chunk / (GROUP / CHUNK) * outputs + output);
            }
            ahead++;
            if (++its_step == steps) its_step = 0, its_tile++;
        }
        end_group();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) fetch(stage);
    if (CHAINED) {
        start_next();
        await_inputs();
    }

    // Where it fits, x comes to shared memory as products want it: of each four runs of 32 columns, a lane's word of
    // each run beside the word that goes with it.
    char* const xs = (char*)dynamic + WARPS * STAGES * STAGE_BYTES;
    const int row_bytes = (depth + 127) / 128 * 256 + 64;
    float* const sums_of_x = (float*)(xs + rows * row_bytes);
    float* const meeting = SHARED_X ? sums_of_x + chunks * ROWS : (float*)xs;
    const int run = t * READ / 16, within = t * READ % 16;
    const char* rows_of_x[COLUMNS];  // columns of a product that are no rows of x repeat its last one
    for (int n = 0; n < COLUMNS; n++) {
        const int row = min(n * 8 + g, rows - 1);
        rows_of_x[n] = SHARED_X ? xs + row * row_bytes + within / 8 * 64 + within % 8 * 2
                                : (const char*)(x + (u64)row * depth + run * 32 + within / 2);
    }
    auto read_x = [&](u32 (&pairs)[WORDS][2], int n, int chunk, int s) {
        if constexpr (SHARED_X) {
            const u32 at = chunk * (READ / 4) + run;
            const char* from = rows_of_x[n] + at / 4 * 256 + at % 4 * 16 + s * 128;
#pragma unroll
            for (int word = 0; word < WORDS; word += 2) read<WORDS == 1 ? 8 : 16>(pairs[word], from + word * 32);
        } else {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 held[WORDS];
                read<READ>(held, rows_of_x[n] + (chunk * CHUNK + s * 16 + j * 8) * 2);
                for (int word = 0; word < WORDS; word++) pairs[word][j] = held[word];
            }
        }
    };
    const u32 rows_of_ones[4] = {ONES<BF16>, ONES<BF16>, ONES<BF16>, ONES<BF16>};
    if constexpr (SHARED_X) {
        for (int at = threadIdx.x; at < rows * (depth / 8); at += THREADS) {
            const int row = at / (depth / 8), piece = at % (depth / 8), s = piece / 2 % 2, j = piece % 2;
            u32 held[4];
            read<16>(held, x + (u64)at * 8);
            char* to = xs + row * row_bytes + piece / 16 * 256 + s * 128 + piece / 4 % 4 * 16 + j * 4;
            for (int word = 0; word < 4; word++) *(u32*)(to + word / 2 * 64 + word % 2 * 8) = held[word];
        }
        __syncthreads();
        for (int chunk = warp; chunk < chunks; chunk += WARPS)
            for (int n = 0; n < COLUMNS; n++) {
                float ones[4] = {};
                for (int s = 0; s < 2; s++) {
                    u32 pairs[WORDS][2];
                    read_x(pairs, n, chunk, s);
                    for (int word = 0; word < WORDS; word++) multiply_add<BF16>(ones, rows_of_ones, pairs[word]);
                }
                if (g == 0)
                    for (int e = 0; e < 2; e++) sums_of_x[chunk * ROWS + n * 8 + 2 * t + e] = ones[e];
            }
        __syncthreads();
    }

    float total[TILES][COLUMNS][4] = {};
    auto add = [&](const char* stage, int k, int chunk) {
        float sums[TILES][COLUMNS][4] = {}, ones[COLUMNS][4] = {};
        u32 codes[TILES][2][WORDS];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int at = (k * 4 + t) * READ;
                read<READ>(codes[i][h], stage + (i * 16 + h * 8 + g) * WIDTH + (PIECES < 8 ? at : at ^ g % 2 * 64));
            }
#pragma unroll
        for (int s = 0; s < 2; s++) {
            u32 pairs[COLUMNS][WORDS][2];  // of x
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) read_x(pairs[n], n, chunk, s);
#pragma unroll
            for (int word = 0; word < WORDS; word++) {
                if constexpr (!SHARED_X)
                    for (int n = 0; n < COLUMNS; n++) multiply_add<BF16>(ones[n], rows_of_ones, pairs[n][word]);
                for (int i = 0; i < TILES; i++) {
                    u32 a[4];
                    for (int h = 0; h < 2; h++)
                        for (int j = 0; j < 2; j++) a[2 * j + h] = code_pair<BF16>(codes[i][h][word], s, j);
                    for (int n = 0; n < COLUMNS; n++) multiply_add<BF16>(sums[i][n], a, pairs[n][word]);
                }
            }
        }
        if constexpr (SHARED_X)
            for (int n = 0; n < COLUMNS; n++) read<8>((u32*)ones[n], sums_of_x + chunk * ROWS + n * 8 + 2 * t);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            u32 grid[2];  // scales and zeros of two outputs
            read<8>(grid, stage + CODES_BYTES + (k * TILES + i) * 64 + g * 8);
            for (int h = 0; h < 2; h++) {
                const float scale = widen<BF16>(grid[0] >> 16 * h), zero = OFFSET<BF16> + widen<BF16>(grid[1] >> 16 * h);
                for (int n = 0; n < COLUMNS; n++)
                    for (int e = 0; e < 2; e++)
                        total[i][n][2 * h + e] += scale * (sums[i][n][2 * h + e] - zero * ones[n][e]);
            }
        }
    };
    // Those of a warp and a tile are numbered by the sum of both, as each begins where another has ended.
    auto keep = [&](int tile) {
        float* to = meeting + (warp + tile) * rows * MEETING_ROW + 2 * g;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int row = n * 8 + 2 * t + j % 2;
                    if (row < rows) to[row * MEETING_ROW + i * 16 + j / 2] = total[i][n][j];
                    total[i][n][j] = 0;
                }
    };
    int tile = begin / steps, step = begin % steps;
    for (int index = begin, stage = 0; index < end; index++) {
        await_groups<STAGES - 1>();
#pragma unroll
        for (int k = 0; k < CHUNKS; k++)
            if (step * CHUNKS + k < chunks) add(ring + stage * STAGE_BYTES, k, step * CHUNKS + k);
        __syncwarp();  // all have read what is replaced
        fetch(stage);
        if (++stage == STAGES) stage = 0;
        if (++step == steps || index + 1 == end) keep(tile);
        if (step == steps) step = 0, tile++;
    }

    __syncthreads();
    for (int at = threadIdx.x; at < rows * tiles * of_tile; at += THREADS) {
        const int row = at / (tiles * of_tile), output = at % (tiles * of_tile), tile = output / of_tile;
        if (first + output >= outputs) continue;
        const int place = output % of_tile / lines * 16 + output % of_tile % lines;
        float sum = bias ? widen<BF16>(bias[first + output]) : 0;
        for (int warp = 0; warp < WARPS; warp++)
            if (max(share(warp), tile * steps) < min(share(warp + 1), (tile + 1) * steps))
                sum += meeting[((warp + tile) * rows + row) * MEETING_ROW + place];
        out[(u64)row * outputs + first + output] = (u16)round_pair<BF16>(sum, 0);
    }
}
