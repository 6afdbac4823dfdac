// Products with 4-bit weights on the tensor cores. `w4a16_stream.py` says what is computed, and how the work is cut.
//
// Weights are the rows of the first operand, rows of x the columns of the second. A program multiplies OUTPUTS by ROWS of
// them, a step of columns at a time. FETCHING of its warps bring steps to a ring of STAGES in shared memory, the others
// multiply them, 16 TILES outputs each. A program's share of all steps may begin and end within a tile: what several have
// made of one meets in memory, and the last to arrive adds it up, always in the same order.
//
// Lane 4g + t gets of outputs g and g + 8 word t of each run of 32 columns (`pack_w4`), which is what two products of 16
// columns want of it. Codes (`w4a16.cuh`), less the zero, times the scale, are the weights. What a zero is more than
// whole is taken away after the scale.
//
// TOGETHER, four warps multiply what each holds of weights with x as it lies in shared memory, while they decode what
// comes next; else each warp reads x by itself.

static_assert(WARPS % 4 == 0 && FETCHING % 4 == 0);
constexpr int MULTIPLYING = WARPS - FETCHING, THREADS = 32 * WARPS, MULTIPLIERS = 32 * MULTIPLYING;
constexpr int OUTPUTS = 16 * TILES * MULTIPLYING, ROWS = 8 * COLUMNS, FETCHED = OUTPUTS / FETCHING;  // by a warp
constexpr int RUN = 32, STEP = 4 * RUN, HALF = STEP / 2;                              // columns
constexpr int X_PIECES = STEP / 8, CODES_PIECES = STEP / RUN;                         // 16 bytes of a row
constexpr int GRIDS = GROUP % STEP == 0 ? 1 : GROUP % HALF == 0 ? 2 : 4;              // of a step, with a scale each
constexpr int HALF_BYTES = ROWS * HALF * 2, CODES_AT = 2 * HALF_BYTES, GRIDS_AT = CODES_AT + OUTPUTS * STEP / 2;
constexpr int STAGE_BYTES = (GRIDS_AT + 2 * GRIDS * OUTPUTS * 2 + 1023) / 1024 * 1024;
constexpr int AHEAD = STAGES > 3 ? STAGES - 2 : STAGES - 1;  // steps under way; of many stages, one more has come by then
constexpr int UNDER_WAY = TILES;                             // products that four warps have at once
constexpr int HELD = 2 * TILES;                              // operands of 16 weights each way, one of them being decoded
static_assert(HELD > UNDER_WAY && 8 * TILES % HELD == 0);    // it is none of a product under way, in the next step neither
constexpr int FRAGMENTS = TILES * COLUMNS;

// Registers of a thread: as many for all, until those that fetch leave most of theirs to the others.
__device__ constexpr int at_most(int most, int x) { return x < most ? x : most; }
constexpr int AT_FIRST = at_most(255, 65536 / (THREADS * PER_SM)) / 8 * 8, FETCHERS_KEEP = 40;
constexpr int LEFT = at_most(240, (AT_FIRST * WARPS - FETCHERS_KEEP * FETCHING) / MULTIPLYING) / 8 * 8;
constexpr bool TAKES = TOGETHER && AT_FIRST < LEFT;
constexpr int REGISTERS = TAKES ? LEFT : AT_FIRST;
constexpr int AT_ONCE = (REGISTERS - 50) / (4 * FRAGMENTS) - 1;  // programs whose sums there is room for beside a tile's own

// Barriers, of each kind one for each stage: its step has come, and is no longer read.
constexpr int COME = 1, READ = COME + STAGES;
static_assert(AHEAD > 0 && READ + STAGES <= 16);
extern "C" __constant__ const int shared_bytes = STAGES * STAGE_BYTES;

struct Place {  // of a step: its first ones, and where this thread reads the first of what it fetches
    int output, row, column;
    const char* codes;
    const u16* x;
};

// What an output's codes become weights by.
struct Grid {
    u32 offset, scale, rest;
    __device__ Grid() {}
    __device__ Grid(const u16* at) {
        const u32 zero = at[GRIDS * OUTPUTS] * 0x10001u, one = at[0] * 0x10001u;
        // Rounding to what OFFSET + code can be makes the zero whole, but for its sign.
        u32 whole = fused<BF16>(zero, ONES<BF16> ^ SIGNS, OFFSETS<BF16> ^ SIGNS);
        whole = fused<BF16>(whole, ONES<BF16>, OFFSETS<BF16>);
        const u32 more = fused<BF16>(zero, ONES<BF16> ^ SIGNS, whole ^ SIGNS);
        offset = fused<BF16>(whole, LOWERED<BF16>, SIGNS);
        scale = fused<BF16>(one, RAISE_LOWERED<BF16>, SIGNS);
        rest = fused<BF16>(more, one, SIGNS);
    }
    __device__ u32 weights(u32 word, int s, int j) const {
        return fused<BF16>(lowered_pair<BF16>(word, s, j, offset), scale, rest);
    }
};

// `use` of each product's sums and its number. No generic lambda: NVRTC 13.0 takes those for the host's.
template <class Use> __device__ inline void each(float (&total)[TILES][COLUMNS][4], Use use) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) use(total[i][n], i * COLUMNS + n);
}

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM) w4a16(
    const u16* x,       // [rows, depth]
    const char* weight, // [outputs, depth / 2]
    const u16* scales,  // [depth / GROUP, outputs]
    const u16* zeros,
    const u16* bias,    // [outputs], or null
    u16* out,           // [rows, outputs]
    float* partial,     // [programs, 2, OUTPUTS · ROWS]: of the tiles in which a share begins, and ends if in another
    int* arrivals,      // [programs] zeros, before and after
    int rows,
    int outputs,        // a multiple of 8
    int depth,
    int share           // steps of a program, of those of all tiles, one tile's after the other's
) {
    extern __shared__ __align__(1024) Words4 dynamic[];
    const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    const int fetcher = threadIdx.x % (32 * FETCHING), fetched = warp % FETCHING * FETCHED;  // the first of this warp
    const int steps = (depth + STEP - 1) / STEP, row_tiles = (rows + ROWS - 1) / ROWS;
    const int begin = blockIdx.x * share;
    const int count = min(share, (outputs + OUTPUTS - 1) / OUTPUTS * row_tiles * steps - begin);
    const int x_row = fetcher / X_PIECES, x_piece = fetcher % X_PIECES;
    const int codes_row = fetched + lane / CODES_PIECES, codes_piece = lane % CODES_PIECES;
    auto place_of = [&](int output, int row, int column) {
        const char* codes = weight + ((u64)(output + codes_row) * depth + column) / 2 + codes_piece * 16;
        return Place{output, row, column, codes, x + (u64)(row + x_row) * depth + column + x_piece * 8};
    };
    auto after = [&](Place at) {
        at.column += STEP, at.codes += STEP / 2, at.x += STEP;
        if (at.column < depth) return at;
        return at.row + ROWS < rows ? place_of(at.output, at.row + ROWS, 0) : place_of(at.output + OUTPUTS, 0, 0);
    };

    // 16 bytes of codes, and of x, lie where eight lanes that read below one another find them in all banks.
    auto codes_at = [](int row, int piece) {
        return CODES_AT + row * (STEP / 2) + (piece ^ row * CODES_PIECES / 8 % CODES_PIECES) * 16;
    };
    const int codes_to = codes_at(codes_row, codes_piece);
    const int x_to = x_piece / 8 * HALF_BYTES + x_row * 128 + (x_piece ^ x_row) % 8 * 16;
    auto fetch_codes = [&](const Place& at, char* to) {
        const int left = at.column + codes_piece * RUN < depth ? outputs - at.output - codes_row : 0;
        const char* from = at.codes;
        constexpr int AT_ONCE = 32 / CODES_PIECES;
#pragma unroll
        for (int i = 0; i < FETCHED; i += AT_ONCE, from += (u64)AT_ONCE * (depth / 2))
            copy_async_if(i < left, to + codes_to + i * (STEP / 2), from);
        constexpr int PIECES = FETCHED / 8;  // of a grid
#pragma unroll
        for (int i = 0; i < 2 * GRIDS * PIECES; i += 32) {
            const int of = (i + lane) / PIECES, output = fetched + (i + lane) % PIECES * 8, first = at.output + output;
            const int start = at.column + of % GRIDS * (STEP / GRIDS);
            const u16* grid = (of < GRIDS ? scales : zeros) + (u64)(start / GROUP) * outputs + first;
            if (of < 2 * GRIDS)
                copy_async_if(start < depth && first < outputs, to + GRIDS_AT + (of * OUTPUTS + output) * 2, grid);
        }
    };
    auto fetch_x = [&](const Place& at, char* to) {
        const int left = at.column + x_piece * 8 < depth ? rows - at.row - x_row : 0;
        const u16* from = at.x;
        constexpr int AT_ONCE = 32 * FETCHING / X_PIECES;
#pragma unroll
        for (int i = 0; i < ROWS; i += AT_ONCE, from += (u64)AT_ONCE * depth)
            if (ROWS % AT_ONCE == 0 || i + x_row < ROWS) copy_async_if(i < left, to + x_to + i * 128, from);
    };

    auto stage_of = [&](int index) { return (char*)dynamic + index % STAGES * STAGE_BYTES; };
    const Place start = place_of(begin / steps / row_tiles * OUTPUTS, begin / steps % row_tiles * ROWS, begin % steps * STEP);
    auto fetch = [&] {  // all steps, for the others
        Place ahead = start;
        for (int index = 0; index < min(AHEAD, count); index++, ahead = after(ahead)) fetch_codes(ahead, stage_of(index));
        if (CHAINED) await_inputs();
        ahead = start;
        for (int index = 0; index < count + AHEAD; index++) {
            if (index >= AHEAD) {
                await_groups<AHEAD - 1>();
                if (TOGETHER) publish();
                arrive(COME + (index - AHEAD) % STAGES, THREADS);
            }
            if (index < count) {
                if (index >= STAGES) meet(READ + index % STAGES, THREADS);
                if (index >= AHEAD) fetch_codes(ahead, stage_of(index));
                fetch_x(ahead, stage_of(index));
                ahead = after(ahead);
            }
            end_group();
        }
    };

    auto release = [&](int index) {  // for a step that comes to its place
        if (index >= 0 && index + STAGES < count) arrive(READ + index % STAGES, THREADS);
    };
    const int own = warp * (16 * TILES);  // the first output of this warp
    u32 a[HELD][4];

    // With a step.
    auto multiply = [&](float(&total)[TILES][COLUMNS][4], int index) {
        const char* stage = stage_of(index);
        const u16* grids = (const u16*)(stage + GRIDS_AT) + own + g;
        const u64 columns = TOGETHER ? shared_matrix(stage) : 0;
        u32 codes[TILES][4];
        Grid grid[TILES][2];
#pragma unroll(TOGETHER ? 4 : 2)
        for (int run = 0; run < 4; run++) {
            if (run % 2 == 0)
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    read_matrices(codes[i], stage + codes_at(own + i * 16 + lane % 16, run + lane / 16));
            if (run % (4 / GRIDS) == 0)
#pragma unroll
                for (int i = 0; i < TILES; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) grid[i][h] = Grid(grids + run * GRIDS / 4 * OUTPUTS + i * 16 + h * 8);
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    auto& held = a[((run * 2 + s) * TILES + i) % HELD];
#pragma unroll
                    for (int h = 0; h < 2; h++)
#pragma unroll
                        for (int j = 0; j < 2; j++) held[2 * j + h] = grid[i][h].weights(codes[i][run % 2 * 2 + h], s, j);
                    if constexpr (TOGETHER) {
                        start_products(held);
                        const u64 pairs = behind(columns, run / 2 * HALF_BYTES + (run % 2 * 2 + s) * 32);
                        multiply_add_async<BF16, COLUMNS>(total[i], held, pairs);
                        end_products();
                        await_products<UNDER_WAY>();  // what is decoded next replaces the oldest
                    }
                }
            if constexpr (!TOGETHER)
#pragma unroll
                for (int n = 0; n < COLUMNS; n++) {
                    u32 pairs[4];
                    const int piece = run % 2 * 4 + lane / 8;
                    read_matrices(pairs, stage + run / 2 * HALF_BYTES + (n * 8 + lane % 8) * 128 + (piece ^ lane % 8) * 16);
#pragma unroll
                    for (int s = 0; s < 2; s++) {
                        const u32 b[2] = {pairs[2 * s], pairs[2 * s + 1]};
#pragma unroll
                        for (int i = 0; i < TILES; i++)
                            multiply_add<BF16>(total[i][n], a[((run * 2 + s) * TILES + i) % HELD], b);
                    }
                }
            if (TOGETHER && run == 0) release(index - 1);  // which no product under way reads
        }
        if (!TOGETHER) release(index);
    };

    // Of a fragment, where its four floats lie among those of all warps.
    auto place = [&](int fragment) { return ((warp * FRAGMENTS + fragment) * 32 + lane) * 4; };
    // Whether `total` is now that of the whole tile.
    auto gather = [&](float(&total)[TILES][COLUMNS][4], int tile) {
        const int first = tile * steps / share, last = (tile * steps + steps - 1) / share;  // programs that share it
        if (first == last) return true;
        auto slot = [&](int program) {
            int second = program * share / steps != tile;
            return partial + (u64)(2 * program + second) * (OUTPUTS * ROWS);
        };
        auto others_have = [&](int arriving) {
            return any_member(0, MULTIPLIERS, threadIdx.x == 0 && atomicAdd(arrivals + first, arriving) == last - first);
        };
        const bool keeps = blockIdx.x == first && others_have(0);  // its sums, which come first, where they are
        if (!keeps) {
            float* to = slot(blockIdx.x);
            each(total, [&](float(&sums)[4], int fragment) {
                *(Floats4*)(to + place(fragment)) = {sums[0], sums[1], sums[2], sums[3]};
            });
            __threadfence();
            meet(0, MULTIPLIERS);
            if (!others_have(1)) return false;
            each(total, [&](float(&sums)[4], int) { sums[0] = sums[1] = sums[2] = sums[3] = 0; });
        }
        __threadfence();
        if (threadIdx.x == 0) arrivals[first] = 0;  // for the next kernel
#pragma unroll(AT_ONCE < 1 ? 1 : AT_ONCE < 4 ? AT_ONCE : 4)
        for (int program = first + keeps; program <= last; program++) {
            const float* from = slot(program);
            each(total, [&](float(&sums)[4], int fragment) {
                Floats4 more = load_written4(from + place(fragment));
                for (int j = 0; j < 4; j++) sums[j] += more.x[j];
            });
        }
        return true;
    };
    auto write = [&](float(&total)[TILES][COLUMNS][4], int tile) {
        const int output = tile / row_tiles * OUTPUTS + own, row = tile % row_tiles * ROWS + g;
        each(total, [&](float(&sums)[4], int fragment) {
            const int first = output + fragment / COLUMNS * 16, of = row + fragment % COLUMNS * 8;
            for (int h = 0; h < 2; h++) {
                const int from = first + h * 8 + g, to = first + h * 8 + 2 * t;
                float more = bias && from < outputs ? widen<BF16>(bias[from]) : 0;
                u32 pair = transpose(round_pair<BF16>(sums[2 * h] + more, sums[2 * h + 1] + more));
                if (of < rows && to < outputs) *(u32*)(out + (u64)of * outputs + to) = pair;
            }
        });
    };

    if (CHAINED) start_next();
    if (warp >= MULTIPLYING) {
        if constexpr (TAKES) keep_registers<FETCHERS_KEEP>();
        fetch();
        return;
    }
    if constexpr (TAKES) take_registers<REGISTERS>();
    if (CHAINED) await_inputs();
    for (int index = 0; index < count;) {
        const int tile = (begin + index) / steps, end = min(count, (tile + 1) * steps - begin);
        float total[TILES][COLUMNS][4] = {};
        each(total, [&](float(&sums)[4], int) { settle(sums); });
        for (; index < end; index++) {
            meet(COME + index % STAGES, THREADS);
            multiply(total, index);
        }
        if constexpr (TOGETHER) await_products<0>();
        each(total, [&](float(&sums)[4], int) { settle(sums); });
        if (gather(total, tile)) write(total, tile);
    }
}
