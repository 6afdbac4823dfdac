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
// A program has `tiles` of OUTPUTS outputs, of which it uses `lines` of each 16. The chunks of columns of all of them, one
// tile's after the other's, are its warps' to share, a run of them each: a warp's reads are STAGES chunks ahead wherever
// it is, and warps meet once, at the end.
//
// A lane is 4g + t. A product takes its columns in any order: each t has READ neighbouring bytes of a chunk, so that what
// a lane reads of weights and of x lies side by side. A chunk stays within one group of GROUP columns.

constexpr int THREADS = 32 * WARPS;
constexpr int READ = GROUP % 128 == 0 ? 16 : GROUP % 64 == 0 ? 8 : 4;
constexpr int CHUNK = 8 * READ, WORDS = READ / 4;  // columns, and of each lane words of 8 codes
constexpr int OUTPUTS = 16 * TILES, ROWS = 8 * COLUMNS;
constexpr int STAGE_BYTES = TILES * 2 * 32 * READ + 128;
constexpr int MEETING_ROW = OUTPUTS + 4;  // floats of a row of x where warps meet
extern "C" __constant__ const int shared_bytes = SHARED;

struct Chunk {
    u32 codes[TILES][2][WORDS];
    u32 scale[TILES], zero[TILES];
};

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
    int lines           // even, of 16
) {
    extern __shared__ Words4 dynamic[];
    const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    const int chunks = depth / CHUNK, of_tile = TILES * lines, first = blockIdx.x * most_tiles * of_tile;
    const int tiles = min(most_tiles, (outputs - first + of_tile - 1) / of_tile);
    const int begin = warp * tiles * chunks / WARPS, end = (warp + 1) * tiles * chunks / WARPS;

    // What is to be fetched.
    int ahead = begin, its_chunk = begin % chunks, its_tile = begin / chunks;
    const char* codes_of[TILES];
    u32 line_of[TILES];
    auto find = [&] {
        for (int i = 0; i < TILES; i++) {
            line_of[i] = min(first + (its_tile * TILES + i) * lines + min(2 * g, lines - 2), outputs - 2);
            codes_of[i] = weight + (u64)line_of[i] * (depth / 2) + its_chunk * (4 * READ) + t * READ;
        }
    };
    find();
#if RING
    // What a lane has copied it reads by itself, but for scales and zeros.
    char* const ring = (char*)dynamic + warp * (STAGES * STAGE_BYTES);
    auto fetch = [&](int stage) {
        if (ahead < end) {
            char* to = ring + stage * STAGE_BYTES + lane * READ;
            for (int i = 0; i < TILES; i++) {
                for (int h = 0; h < 2; h++) copy_async<READ>(to + (i * 2 + h) * (32 * READ), codes_of[i] + h * (depth / 2));
                codes_of[i] += 4 * READ;
            }
            const u32 at = its_chunk / (GROUP / CHUNK) * outputs + line_of[TILES == 1 ? 0 : t / 2];
            if (t < 2 * TILES) copy_async<4>(to + 2 * TILES * 32 * READ - lane * READ + lane * 4, (t % 2 ? zeros : scales) + at);
            ahead++;
            if (++its_chunk == chunks) its_chunk = 0, its_tile++, find();
        }
        end_group();
    };
    auto take = [&](Chunk& held, int stage) {
        const char* from = ring + stage * STAGE_BYTES;
        for (int i = 0; i < TILES; i++) {
            for (int h = 0; h < 2; h++) read<READ>(held.codes[i][h], from + (i * 2 + h) * (32 * READ) + lane * READ);
            u32 pair[2];
            read<8>(pair, from + 2 * TILES * 32 * READ + (4 * g + 2 * i) * 4);
            held.scale[i] = pair[0], held.zero[i] = pair[1];
        }
    };
    for (int stage = 0; stage < STAGES; stage++) fetch(stage);
#else
    auto fetch = [&](Chunk& chunk) {
        if (ahead >= end) return;
        for (int i = 0; i < TILES; i++) {
            for (int h = 0; h < 2; h++) read_once<READ>(chunk.codes[i][h], codes_of[i] + h * (depth / 2));
            const u32 at = its_chunk / (GROUP / CHUNK) * outputs + line_of[i];
            read<4>(&chunk.scale[i], scales + at), read<4>(&chunk.zero[i], zeros + at);
            codes_of[i] += 4 * READ;
        }
        ahead++;
        if (++its_chunk == chunks) its_chunk = 0, its_tile++, find();
    };
    Chunk held[STAGES];
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) fetch(held[stage]);
#endif
    if (CHAINED) {
        start_next();
        await_inputs();
    }

    // Runs of 32 columns are four pieces of 8, which lie where lanes t of a product find theirs side by side.
    const int run = t * READ / 16, within = t * READ % 16;
#if SHARED_X
    const int row_bytes = (depth + 127) / 128 * 256 + 64;
    char* const xs = (char*)dynamic + RING * (WARPS * STAGES * STAGE_BYTES);
    for (int at = threadIdx.x; at < rows * (depth / 8); at += THREADS) {
        const int row = at / (depth / 8), piece = at % (depth / 8);
        u32 held[4];
        read<16>(held, x + (u64)at * 8);
        const int s = piece / 2 % 2, j = piece % 2;
        char* to = xs + row * row_bytes + piece / 16 * 256 + s * 128 + piece / 4 % 4 * 16 + j * 4;
        for (int word = 0; word < 4; word++) *(u32*)(to + word / 2 * 64 + word % 2 * 8) = held[word];
    }
    __syncthreads();
    float* const sums_of_x = (float*)(xs + rows * row_bytes);
    float* const meeting = sums_of_x + chunks * ROWS;
    const char* rows_of_x[COLUMNS];
    for (int n = 0; n < COLUMNS; n++) rows_of_x[n] = xs + min(n * 8 + g, rows - 1) * row_bytes + within / 8 * 64 + within % 8 * 2;
    auto read_x = [&](u32 (&pairs)[WORDS][2], int n, int chunk, int s) {
        const u32 at = READ == 16 ? chunk * 4 + run : READ == 8 ? chunk * 2 + run : chunk;
        const char* from = rows_of_x[n] + at / 4 * 256 + at % 4 * 16 + s * 128;
        for (int word = 0; word < WORDS; word += 2) read<WORDS == 1 ? 8 : 16>(pairs[word], from + word * 32);
    };
    for (int chunk = warp; chunk < chunks; chunk += WARPS)
        for (int n = 0; n < COLUMNS; n++) {
            float ones[4] = {};
            for (int s = 0; s < 2; s++) {
                u32 pairs[WORDS][2];
                read_x(pairs, n, chunk, s);
                for (int word = 0; word < WORDS; word++) {
                    const u32 a[4] = {ONES<BF16>, ONES<BF16>, ONES<BF16>, ONES<BF16>};
                    multiply_add<BF16>(ones, a, pairs[word]);
                }
            }
            if (g == 0) for (int e = 0; e < 2; e++) sums_of_x[chunk * ROWS + n * 8 + 2 * t + e] = ones[e];
        }
    __syncthreads();
#else
    float* const meeting = (float*)((char*)dynamic + RING * (WARPS * STAGES * STAGE_BYTES));
    const u16* rows_of_x[COLUMNS];  // columns of a product that are no rows of x repeat its last one
    for (int n = 0; n < COLUMNS; n++) rows_of_x[n] = x + (u64)min(n * 8 + g, rows - 1) * depth + run * 32 + within / 2;
    auto read_x = [&](u32 (&pairs)[WORDS][2], int n, int chunk, int s) {
        for (int j = 0; j < 2; j++) {
            u32 held[WORDS];
            read<READ>(held, rows_of_x[n] + chunk * CHUNK + s * 16 + j * 8);
            for (int word = 0; word < WORDS; word++) pairs[word][j] = held[word];
        }
    };
#endif

    float total[TILES][COLUMNS][4] = {};
    auto add = [&](const Chunk& held, int chunk) {
        float sums[TILES][COLUMNS][4] = {}, ones[COLUMNS][4] = {};
#pragma unroll
        for (int s = 0; s < 2; s++) {
            u32 pairs[COLUMNS][WORDS][2];  // of x
            for (int n = 0; n < COLUMNS; n++) read_x(pairs[n], n, chunk, s);
#pragma unroll
            for (int word = 0; word < WORDS; word++) {
                for (int n = 0; n < COLUMNS; n++) {
                    const u32 rows_of_ones[4] = {ONES<BF16>, ONES<BF16>, ONES<BF16>, ONES<BF16>};
                    if (!SHARED_X) multiply_add<BF16>(ones[n], rows_of_ones, pairs[n][word]);
                }
                for (int i = 0; i < TILES; i++) {
                    u32 a[4];
                    for (int h = 0; h < 2; h++)
                        for (int j = 0; j < 2; j++) a[2 * j + h] = code_pair<BF16>(held.codes[i][h][word], s, j);
                    for (int n = 0; n < COLUMNS; n++) multiply_add<BF16>(sums[i][n], a, pairs[n][word]);
                }
            }
        }
#if SHARED_X
        for (int n = 0; n < COLUMNS; n++) read<8>((u32*)ones[n], sums_of_x + chunk * ROWS + n * 8 + 2 * t);
#endif
        for (int i = 0; i < TILES; i++)
            for (int h = 0; h < 2; h++) {
                const float scale = widen<BF16>(held.scale[i] >> 16 * h);
                const float zero = OFFSET<BF16> + widen<BF16>(held.zero[i] >> 16 * h);
                for (int n = 0; n < COLUMNS; n++)
                    for (int e = 0; e < 2; e++)
                        total[i][n][2 * h + e] += scale * (sums[i][n][2 * h + e] - zero * ones[n][e]);
            }
    };
    // A warp and a tile after those of another pair have a sum of their own.
    auto keep = [&](int tile) {
        float* to = meeting + (warp + tile) * rows * MEETING_ROW + 2 * g;
        for (int i = 0; i < TILES; i++)
            for (int n = 0; n < COLUMNS; n++)
                for (int e = 0; e < 2; e++)
                    for (int h = 0; h < 2; h++) {
                        const int row = n * 8 + 2 * t + e;
                        if (row < rows) to[row * MEETING_ROW + i * 16 + h] = total[i][n][2 * h + e];
                        total[i][n][2 * h + e] = 0;
                    }
    };
    int tile = begin / chunks, chunk = begin % chunks;
#if RING
    for (int index = begin, stage = 0; index < end; index++) {
        await_groups<STAGES - 1>();
        Chunk held;
        take(held, stage);
        add(held, chunk);
        __syncwarp();
        fetch(stage);
        if (++stage == STAGES) stage = 0;
        if (++chunk == chunks) keep(tile++), chunk = 0;
    }
#else
    for (int index = begin; index < end;)
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++, index++)
            if (index < end) {
                add(held[stage], chunk);
                fetch(held[stage]);
                if (++chunk == chunks) keep(tile++), chunk = 0;
            }
#endif
    if (chunk && begin < end) keep(tile);

    __syncthreads();
    for (int at = threadIdx.x; at < rows * tiles * of_tile; at += THREADS) {
        const int row = at / (tiles * of_tile), output = at % (tiles * of_tile), of = output / of_tile;
        if (first + output >= outputs) continue;
        float sum = bias ? widen<BF16>(bias[first + output]) : 0;
        const float* from = meeting + of * rows * MEETING_ROW + row * MEETING_ROW;
        const int place = output % of_tile / lines * 16 + output % of_tile % lines;
        for (int i = 0; i < WARPS; i++) {
            const int its_begin = i * tiles * chunks / WARPS, its_end = (i + 1) * tiles * chunks / WARPS;
            if (its_begin < min((of + 1) * chunks, its_end) && its_end > of * chunks) sum += from[i * rows * MEETING_ROW + place];
        }
        out[(u64)row * outputs + first + output] = (u16)round_pair<BF16>(sum, 0);
    }
}
