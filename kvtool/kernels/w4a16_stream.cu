// Products with 4-bit weights on the tensor cores. `w4a16_stream.py` says what is computed, and how the work is cut.
//
// Weights are the rows of the first operand, rows of x the columns of the second. A program multiplies OUTPUTS by ROWS of
// them, a step of columns at a time, which come to shared memory in a ring of STAGES; its warps have 16 TILES outputs
// each, and where PARTS of them have the same, as many blocks of a step. A program's share of all steps may begin and
// end within a tile: what several have made of one meets in memory, and the last to arrive adds it up, always in the
// same order.
//
// Lane 4g + t has of each block the run of 32 columns t, of outputs g and g + 8: its 16 bytes. In a product, which takes
// columns in any order, they are in turn the low nibbles of a word, and the high ones. OFFSET + code (`w4a16.cuh`), less
// OFFSET and the zero, times the scale, is the weight. What a zero is more than whole is taken away after the scale.

constexpr int THREADS = 32 * WARPS, LINES = WARPS / PARTS, OUTPUTS = 16 * TILES * LINES, ROWS = 8 * COLUMNS;
constexpr int RUN = 32, BLOCK = 4 * RUN, STEP = PARTS * BLOCK;                // columns
constexpr int CODES_BYTES = OUTPUTS * BLOCK / 2, X_BYTES = ROWS * BLOCK * 2;  // of a block
constexpr int STAGE_BYTES = PARTS * (CODES_BYTES + X_BYTES), FRAGMENTS = TILES * COLUMNS;
extern "C" __constant__ const int shared_bytes = STAGES * STAGE_BYTES + (PARTS - 1) * OUTPUTS * ROWS * 4;

struct Place { int output, row, column; };  // of a step, its first ones

struct Grid {
    u16 scale[TILES][2], zero[TILES][2];
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
    const u16* scales,  // [outputs, depth / GROUP]
    const u16* zeros,
    const u16* bias,    // [outputs], or null
    u16* out,           // [rows, outputs]
    float* partial,     // [programs, 2, OUTPUTS · ROWS]: of the tiles in which a share begins, and ends if in another
    int* arrivals,      // [programs] zeros, before and after
    int rows,
    int outputs,
    int depth,
    int share           // steps of a program, of those of all tiles, one tile's after the other's
) {
    extern __shared__ Words4 dynamic[];
    const int warp = threadIdx.x / 32, line = warp % LINES, part = warp / LINES;
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    const int steps = (depth + STEP - 1) / STEP, row_tiles = (rows + ROWS - 1) / ROWS;
    const int begin = blockIdx.x * share;
    const int count = min(share, (outputs + OUTPUTS - 1) / OUTPUTS * row_tiles * steps - begin);
    const Place start = {begin / steps / row_tiles * OUTPUTS, begin / steps % row_tiles * ROWS, begin % steps * STEP};
    auto behind = [&](Place at) {
        at.column += STEP;
        if (at.column >= depth) at.column = 0, at.row += ROWS;
        if (at.row >= rows) at.row = 0, at.output += OUTPUTS;
        return at;
    };

    auto fetch_codes = [&](const Place& at, char* to) {
        const int of = threadIdx.x / 4 % PARTS, output = threadIdx.x / 4 / PARTS;
        const int column = at.column + of * BLOCK + t * RUN, left = column < depth ? outputs - at.output - output : 0;
        const char* from = weight + (u64)(at.output + output) * (depth / 2) + column / 2;
        to += of * CODES_BYTES + output * (BLOCK / 2) + t * 16;
#pragma unroll
        for (int i = 0; i < OUTPUTS; i += 8 * LINES, from += (u64)(8 * LINES) * (depth / 2))
            copy_async_if(i < left, to + i * (BLOCK / 2), from);
    };
    // 16 bytes of x are what one lane reads at once. Those of the four runs lie side by side, and change halves from row
    // to row, so that eight lanes read from all banks.
    auto fetch_x = [&](const Place& at, char* to) {
        const int of = threadIdx.x / 16 % PARTS, row = threadIdx.x / 16 / PARTS, place = threadIdx.x % 16 ^ row % 2 * 4;
        const int column = at.column + of * BLOCK + place % 4 * RUN + place / 4 % 2 * 16 + place / 8 * 8;
        const int left = column < depth ? rows - at.row - row : 0;
        const u16* from = x + (u64)(at.row + row) * depth + column;
        to += PARTS * CODES_BYTES + of * X_BYTES + row * (BLOCK * 2) + threadIdx.x % 16 * 16;
#pragma unroll
        for (int i = 0; i < ROWS; i += 2 * LINES, from += (u64)(2 * LINES) * depth)
            if (ROWS % (2 * LINES) == 0 || i + row < ROWS) copy_async_if(i < left, to + i * (BLOCK * 2), from);
    };
    auto fetch_grid = [&](const Place& at, Grid& grid) {
        const int first = at.output + line * (16 * TILES) + g;
        const int column = min(at.column + part * BLOCK + t * RUN, depth - RUN);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 group = min(first + i * 16 + h * 8, outputs - 1) * (depth / GROUP) + column / GROUP;
                grid.scale[i][h] = scales[group];
                grid.zero[i][h] = zeros[group];
            }
    };

    float total[TILES][COLUMNS][4] = {};
    auto multiply = [&](const Grid& grid, const char* stage) {
        const char* codes_of = stage + part * CODES_BYTES + line * (16 * TILES * BLOCK / 2) + lane * 16;
        const char* x_of = stage + PARTS * CODES_BYTES + part * X_BYTES + g * (BLOCK * 2);
        u32 codes[TILES][2][2], offset[TILES][2], scale[TILES][2], rest[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float zero = widen<BF16>(grid.zero[i][h]), whole = rintf(zero);
                float left = (whole - zero) * widen<BF16>(grid.scale[i][h]);
                offset[i][h] = round_pair<BF16>(-OFFSET<BF16> - whole, -OFFSET<BF16> - whole);
                scale[i][h] = grid.scale[i][h] * 0x10001u;
                rest[i][h] = round_pair<BF16>(left, left);
            }
#pragma unroll
        for (int q = 0; q < 4; q++) {  // words 0 and 1 for low nibbles and for high ones, 2 and 3
            u32 a[2][TILES][4];
            if (q % 2 == 0)
#pragma unroll
                for (int i = 0; i < TILES; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        read<8>(codes[i][h], codes_of + (i * 16 + h * 8) * (BLOCK / 2) + q * 4);
#pragma unroll
            for (int w = 0; w < 2; w++)
#pragma unroll
                for (int i = 0; i < TILES; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            u32 pair = fused<BF16>(code_pair<BF16>(codes[i][h][w], q % 2, j), ONES<BF16>, offset[i][h]);
                            a[w][i][2 * j + h] = fused<BF16>(pair, scale[i][h], rest[i][h]);
                        }
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) {
                u32 pairs[4];
                read<16>(pairs, x_of + n * (8 * BLOCK * 2) + ((q * 4 + t) ^ g % 2 * 4) * 16);
#pragma unroll
                for (int w = 0; w < 2; w++) {
                    const u32 b[2] = {pairs[2 * w], pairs[2 * w + 1]};
#pragma unroll
                    for (int i = 0; i < TILES; i++) multiply_add<BF16>(total[i][n], a[w][i], b);
                }
            }
        }
    };

    // Of a fragment, where its four floats lie among those of so many lines of warps.
    auto place = [&](int of, int fragment) { return ((of * FRAGMENTS + fragment) * 32 + lane) * 4; };
    // Add to the first part's what the others have.
    auto meet = [&] {
        float* meeting = (float*)((char*)dynamic + STAGES * STAGE_BYTES);
        if (part)
            each(total, [&](float(&sums)[4], int fragment) {
                *(Floats4*)(meeting + place(warp - LINES, fragment)) = {sums[0], sums[1], sums[2], sums[3]};
            });
        __syncthreads();
        if (!part)
            each(total, [&](float(&sums)[4], int fragment) {
                for (int other = 0; other < PARTS - 1; other++) {
                    Floats4 more = *(const Floats4*)(meeting + place(other * LINES + line, fragment));
                    for (int j = 0; j < 4; j++) sums[j] += more.x[j];
                }
            });
    };
    // Whether `total` is now that of the whole tile.
    auto gather = [&](int tile) {
        const int first = tile * steps / share, last = (tile * steps + steps - 1) / share;  // programs that share it
        if (first == last) return true;
        auto slot = [&](int program) {
            int second = program * share / steps != tile;
            return partial + (u64)(2 * program + second) * (OUTPUTS * ROWS);
        };
        if (!part)
            each(total, [&](float(&sums)[4], int fragment) {
                *(Floats4*)(slot(blockIdx.x) + place(line, fragment)) = {sums[0], sums[1], sums[2], sums[3]};
            });
        __threadfence();
        __syncthreads();
        if (!any_member(0, THREADS, threadIdx.x == 0 && atomicAdd(arrivals + first, 1) == last - first)) return false;
        __threadfence();
        if (threadIdx.x == 0) arrivals[first] = 0;  // for the next kernel
        each(total, [&](float(&sums)[4], int) { sums[0] = sums[1] = sums[2] = sums[3] = 0; });
        if (!part)
            for (int program = first; program <= last; program++) {
                const float* from = slot(program);
                each(total, [&](float(&sums)[4], int fragment) {
                    Floats4 more = load_written4(from + place(line, fragment));
                    for (int j = 0; j < 4; j++) sums[j] += more.x[j];
                });
            }
        return true;
    };
    auto write = [&](const Place& at) {
        const int output = at.output + line * (16 * TILES) + g, row = at.row + 2 * t;
        each(total, [&](float(&sums)[4], int fragment) {
            for (int j = 0; j < 4; j++) {
                int to = output + fragment / COLUMNS * 16 + j / 2 * 8, of = row + fragment % COLUMNS * 8 + j % 2;
                if (to >= outputs || of >= rows) continue;
                float sum = sums[j] + (bias ? widen<BF16>(bias[to]) : 0);
                out[(u64)of * outputs + to] = (u16)round_pair<BF16>(sum, 0);
            }
        });
    };

    auto stage_of = [&](int index) { return (char*)dynamic + index % STAGES * STAGE_BYTES; };
    Place ahead = start;
    for (int index = 0; index < min(STAGES - 1, count); index++, ahead = behind(ahead))
        fetch_codes(ahead, stage_of(index));
    Grid held, next;
    fetch_grid(start, held);
    if (CHAINED) {
        start_next();
        await_inputs();
    }
    ahead = start;
    for (int index = 0; index < STAGES - 1; index++) {
        if (index < count) fetch_x(ahead, stage_of(index)), ahead = behind(ahead);
        end_group();
    }
    Place at = start;
    for (int index = 0; index < count; index++) {
        await_groups<STAGES - 2>();
        __syncthreads();  // all have come, and the stage before is no longer read
        if (index + STAGES - 1 < count) {
            fetch_codes(ahead, stage_of(index + STAGES - 1));
            fetch_x(ahead, stage_of(index + STAGES - 1));
            ahead = behind(ahead);
        }
        end_group();
        const Place behind_it = behind(at);
        if (index + 1 < count) fetch_grid(behind_it, next);
        multiply(held, stage_of(index));
        held = next;
        if (index + 1 == count || behind_it.column == 0) {
            if (PARTS > 1) meet();
            if (gather((begin + index) / steps) && !part) write(at);
            each(total, [&](float(&sums)[4], int) { sums[0] = sums[1] = sums[2] = sums[3] = 0; });
        }
        at = behind_it;
    }
}
