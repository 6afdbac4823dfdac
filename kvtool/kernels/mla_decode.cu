// Decode attention over latents of integer codes (MLA, absorbed): a latent is key and value at once.
// `cuda_mla_decode.py` says what is computed.
//
// A program has 16 query heads, the rows of both products, and walks over tiles of tokens. Some of its warps score: each
// has a run of tokens of a tile, with all of their channels, and leaves their weights in shared memory. The others
// gather: each has a span of channels, of all tokens of the tile. So queries stay in registers of the ones and outputs in
// those of the others, and a warp has a neighbour of the other kind, which is a tile ahead or behind. A latent comes to
// shared memory once, as it lies in a block, and goes from there to either product without a conversion: the bits of a
// code, alone in an fp16, are the subnormal number code · 2^-24, exactly (times 2^(BITS · part) for higher parts of a
// byte).
//
//   scores   [16 heads, 8 tokens]    += queries [16 heads, 16 channels] · latents [16 channels, 8 tokens], ∘scale by group
//   outputs  [16 heads, 8 channels]  += (p∘scale) [16 heads, 16 tokens] · latents [16 tokens, 8 channels]
//
// A lane is 4g + t. A product takes the order of what it sums from whoever loads it: channels are dealt to the t of the
// first so that words are split without being rearranged; to the second, pairs of tokens come transposed.

#include "mla_tiles.cuh"
#include "mla_scorer.cuh"
#include "mla_gatherer.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM) latent_decode(
    const u16* queries,  // [n, heads, L + R]
    u16* out,            // [n, heads, L]
    float* partial,      // [n, heads, splits, L], with splits
    float* lse,          // [n, heads, splits]
    int* arrivals,       // [n, ⌈heads / 16⌉] zeros, before and after; or null: another kernel merges
    const Index* table,
    const Index* positions,
    const Index* visible,
    const Index* slots,
    Stream key,
    Stream value,
    float scale,         // to the exponent of 2
    int table_stride,
    int block_units,     // 16 bytes each, as slot_units
    int slot_units,
    int num_heads,
    int tail_tokens
) {
    extern __shared__ Words4 dynamic[];
    char* shared = (char*)dynamic;
    const int rows = (num_heads + HEADS - 1) / HEADS, seq = blockIdx.x / rows, head = blockIdx.x % rows * HEADS;
    const int heads = min(HEADS, num_heads - head), split = blockIdx.y, splits = gridDim.y;
    const int lane = lane_id();
    const bool scores = threadIdx.x < SCORERS * 32;
    const int warp = threadIdx.x / 32 - (scores ? 0 : SCORERS);
    const Place at = {shared, warp, lane, lane / 4, lane % 4};
    if (CHAINED) await_inputs();
    const u64 row = (u64)seq * num_heads + head;
    const int position = positions[seq], near = visible[seq], far = min(near, position + 1);
    float *tops = (float*)(shared + TOPS), *sums = (float*)shared;  // these when the ring is read
    queries += row * (L + R);
    if (scores) leave_queries(at, tops, queries, heads);  // while positions are on their way
    // As in decode.cu: what starts soon fetches weights to L2, and a long read would drive them out again.
    if (CHAINED && !scores && (int)gridDim.x / rows * position < 8192) start_next();

    // Programs share the tiles, as many as there are shares. The last has the tail too, whose bytes are three to nine
    // times as many for each token.
    const int tiles = (far + TOKENS - 1) / TOKENS, tail_units = (tail_tokens * 4 + TOKENS - 1) / TOKENS;
    const int units = max(1, tiles + tail_units), share = (units + splits - 1) / splits;
    const int shares = (units + share - 1) / share;
    if (arrivals && split >= shares) return;
    const int begin = min(tiles, split * share), count = min(tiles, (split + 1) * share) - begin;
    const int tail_count = split == shares - 1 ? (tail_tokens + TOKENS - 1) / TOKENS : 0;
    const u64 tail = tail_count ? (u64)slots[seq] * slot_units * 16 : 0;
    const u16 *tail_keys = (const u16*)(key.tail + tail), *tail_values = (const u16*)(value.tail + tail);
    if (tail_count && threadIdx.x == SCORERS * 32) prefetch_tail(tail_keys, tail_values, near, position + 1, tail_tokens);

    // Tile k is begin + k; each lane of a gatherer looks up the block of what its warp brings of one of the next 32. What
    // would begin behind the last token is fetched from where that is.
    table += (u64)seq * table_stride;
    const u32 last = max(0, far - 1) / DRAWN * DRAWN;
    int blocks = 0;
    auto first_of = [&](u32 k) { return min((begin + k) * TOKENS + warp * DRAWN, last); };
    auto fetch_tile = [&](u32 k) {
        if (k % 32 == 0 && k + lane < count) blocks = table[first_of(k + lane) / BLOCK];
        u64 block = (u64)(u32)shuffle(blocks, k % 32) * (u32)block_units * 16;
        if (k < count) fetch(shared + k % STAGES * STAGE, key, value, block, first_of(k) % BLOCK, warp);
        end_group();
    };
    if (!scores) {
#pragma unroll 1
        for (int k = 0; k < STAGES - 1; k++) fetch_tile(k);
    }

    // Weights go from scorers to gatherers in one of two buffers, FULL of them. That it is READY means that it is empty
    // again, and that the tile is there which is scored meanwhile. The tail comes first, while tiles are on their way.
    const int all = tail_count + count;
    const bool alone = splits == 1 || arrivals && shares == 1;
    auto stage_of = [&](int tile) { return shared + tile % STAGES * STAGE; };
    if (scores) {
        Scorer w(at, tops, scale);
        auto far_of = [&](int tile) { return far - (begin + tile) * TOKENS; };
        for (int k = 0; k < tail_count; k++) {
            meet(READY + k % 2, ALL);
            w.add_tail(queries, heads, tail_keys, tail_values, k * TOKENS, position, near, tail_tokens, scale, k % 2);
            arrive(FULL + k % 2, ALL);
        }
        meet(BEGUN, ALL);
        if (AHEAD && count > 0) w.add_tile(stage_of(0), far_of(0), [] {});
#pragma unroll 1
        for (int k = tail_count; k < all; k++) {
            const int tile = k - tail_count;
            meet(READY + k % 2, ALL);
            auto leave = [&] {
                w.leave_tile(stage_of(tile), k % 2);
                arrive(FULL + k % 2, ALL);
            };
            if (AHEAD && tile + 1 < count) {
                w.add_tile(stage_of(tile + 1), far_of(tile + 1), leave);
            } else {
                if (!AHEAD) w.add_tile(stage_of(tile), far_of(tile), [] {});
                leave();
            }
        }
        if (CHAINED) start_next();  // all that is long is read
        __syncthreads();
        __syncthreads();
        if (!alone && w.warp == 0 && w.t == 0)
            for (int h = 0; h < 2; h++) {
                const int own = w.g + 8 * h;
                float total = 0;
                for (int i = 0; i < GATHERERS; i++) total += sums[(i * HEADS + own) * SUMS + GROUPS];
                if (own < heads) lse[(row + own) * splits + split] = w.m[h] + log2_of(fmaxf(total, 1e-37f));
            }
    } else {
        Gatherer w(at);
        auto say_ready = [&](int k) {
            if (k < all) arrive(READY + k % 2, ALL);
        };
        await_groups<STAGES - 2>();
        arrive(BEGUN, ALL);
        await_groups<STAGES - 2 - AHEAD>();
        say_ready(0);
        await_groups<STAGES - 3 - AHEAD>();
        say_ready(1);
        for (int k = 0; k < all; k++) {
            meet(FULL + k % 2, ALL);
            const int tile = k - tail_count;
            if (tile >= 0) fetch_tile(tile - 1 + STAGES);  // to where all have left the tile before
            w.rescale(k % 2);
            if (tile < 0) w.add_tail(tail_values, k * TOKENS, tail_tokens, k % 2);
            else w.add_tile(stage_of(tile), k % 2);
            await_groups<STAGES - 3 - AHEAD>();
            say_ready(k + 2);
        }
        await_groups<0>();
        __syncthreads();  // the ring is read
        w.leave_sums(sums);
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int own = w.g + 8 * h;
            if (own < heads)
                w.finish(sums, h, [&](int channel, const Floats4& x) {
                    if (alone)
                        *(Words2*)(out + (row + own) * L + channel) = {
                            round_pair<BF16>(x.x[0], x.x[1]), round_pair<BF16>(x.x[2], x.x[3])
                        };
                    else
                        *(Floats4*)(partial + ((row + own) * splits + split) * L + channel) = x;
                });
        }
    }
    if (alone || !arrivals) return;
    __syncthreads();  // sums are read
    merge_splits<L>(arrivals + blockIdx.x, (float*)shared, partial, lse, out, row, heads, splits, shares);
}
