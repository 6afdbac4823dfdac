// Decode attention. `cuda_decode.py` says what is computed, the file in front what is made of a tile, by a warp of its own.
//
// What a sequence has read for one KV head is a row of units: tiles of up to 64 tokens of a block, then 16 tokens of the tail
// each. The units of all rows, one row behind the other, are dealt evenly to all warps of a launch, whatever the lengths
// of sequences; so a warp has the end of one row, some whole rows, and the beginning of one. Whole rows it writes by itself;
// of the others warps put together what they have found, first those of a program, then programs.

constexpr int RING = STAGES * STAGE;
constexpr int FRAGMENT = COLUMNS * (D / 16 + 2) * 128;  // floats of what a warp has found of a row
constexpr int OWN = RING > 4 * FRAGMENT ? RING : 4 * FRAGMENT;
constexpr int OPEN = WARPS * OWN;                    // where warps say which row they leave open
extern "C" __constant__ const int shared_bytes = OPEN + 16 * (WARPS / 4 + 3);

// What a query reads of its sequence.
struct Reach {
    int first, near;   // position that is seen, and that is read from the tail
    int start, tiles;  // of blocks
    int units;

    // What is packed by the block has its newest token in a tail.
    __device__ inline Reach(int position, int visible, int window) {
        first = max(0, position + 1 - window);
        near = max(first, visible);
        start = first / TOKENS;
        tiles = visible > first ? (visible + TOKENS - 1) / TOKENS - start : 0;
        units = TAIL ? tiles + (position - near) / 16 + 1 : max(1, tiles);
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
        if (!TAIL || passed < reach.tiles) {
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
        } else if (!TAIL || from >= 0) {
            fetch(own + k % STAGES * STAGE, key, value, found * block_units * 16, head, from % BLOCK / TOKENS);
        } else if (CHAINED && lane_id() < 2) {
            int start = ~from % tail_tokens;
            u64 rows = found * slot_units * 16 + ((u64)head * tail_tokens + start) * D * 2;
            prefetch((lane_id() ? value : key).tail + rows, min(16, tail_tokens - start) * D * 2);
        }
        end_group();
    };
    if (begin < end) look_ahead(0);
    if (!TAIL && CHAINED) {  // that kernel writes to blocks
        if (lane < STAGES && begin + lane < end) {
            u64 tile = (u64)block * block_units * 16 + (row % kv_heads * BLOCK + at % BLOCK) * (2 * D);
            prefetch(key.codes + tile, TOKENS * 2 * D);
            prefetch(value.codes + tile, TOKENS * 2 * D);
        }
        await_inputs();
    }
    for (int k = 0; k < STAGES; k++) fetch_unit(k);
    if (TAIL && CHAINED) await_inputs();

    auto program_of = [&](int unit) { return (int)(((u64)(unit + 1) * workers - 1) / total) / WARPS; };
    auto fragment = [&](int program, int which) { return fragments + ((u64)program * (2 + WARPS) + which) * FRAGMENT; };
    auto load_shared = [](const float* from) { return *(const Floats4*)from; };
    auto load_global = [](const float* from) { return load_written4(from); };
    Warp w;
    w.g = lane / 4, w.t = lane % 4;
    int position = 0, first = 0;  // of the row at hand
    int open_row = -1, open_first = 0, open_last = 0, closed_row = -1, closed_first = 0;
    bool begins = true;
    for (int k = 0; begin + k < end; k++) {
        const int place = k - looked, current = shuffle(row, place), from = shuffle(at, place);
        const u16* queries = query + (u64)current * group_heads * D;
        const u64 rows = (u64)shuffle(block, place) * slot_units * 16 + (u64)(current % kv_heads) * tail_tokens * D * 2;
        const Tail tail = {(const u16*)(key.tail + rows), (const u16*)(value.tail + rows), tail_tokens};
        if (begins) {
            position = positions[current / kv_heads];
            first = max(0, position + 1 - window);
            w.begin(queries, group_heads, scale);
        }
        await_groups<STAGES - 1>();
        w.add_unit(own + k % STAGES * STAGE, from, first, position, tail, queries, group_heads, scale);
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
