// What decode kernels share: packed streams, and programs that share a sequence.

constexpr float HEADROOM = 2;  // of a new maximum, to the exponent of 2: few are raised again

// Scores and weights times this stay within fp16: scales are at most 2 · 65,504 / (2^bits - 1).
__device__ constexpr int boost(int bits) { return bits == 8 ? 6 : bits == 4 ? 2 : 0; }
__device__ inline float power_of_2(int n) { return __uint_as_float((u32)(127 + n) << 23); }
__device__ constexpr u32 code_mask(int bits, int part) { return ((1 << bits) - 1 << bits * part) * 0x10001u; }

struct Stream {
    const char *codes, *scale, *zero, *tail;
};

// `BYTES` to shared memory, chunk by chunk of 16; `place` gives each its address.
template <int BYTES, typename Place> __device__ inline void copy(char* to, const char* from, Place place) {
    u32 lane = lane_id();
#pragma unroll
    for (int at = 0; at < BYTES; at += 512)
        if (BYTES - at >= 512 || lane * 16 < BYTES - at) copy_async(to + place(at, lane * 16), from + at + lane * 16);
}

// Programs meet: the last of `shares` to arrive finds what all have written, the outputs of `heads` rows from `row` on,
// and makes their mean, by 2^lse. `shared` is memory that nobody reads any more.
template <int CHANNELS> __device__ inline void merge_splits(
    int* arrivals, float* shared, const float* partial, const float* lse, void* out, u64 row, int heads, int splits,
    int shares
) {
    const int warp = threadIdx.x / 32, lane = lane_id();
    __threadfence();
    __syncthreads();
    int* arrived = (int*)shared;
    if (threadIdx.x == 0) *arrived = atomicAdd(arrivals, 1);
    __syncthreads();
    if (*arrived != shares - 1) return;
    __threadfence();
    if (threadIdx.x == 0) *arrivals = 0;  // for the next kernel
    float* weights = shared + 4;            // [heads, shares]
    for (int column = warp; column < heads; column += WARPS) {
        const float* from = lse + (row + column) * splits;
        float *own = weights + column * shares, top = -1e30f, total = 0;
        for (int i = lane; i < shares; i += 32) top = fmaxf(top, own[i] = load_written(from + i));
        for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
        for (int i = lane; i < shares; i += 32) total += own[i] = exp2_of(own[i] - top);
        for (int mask = 1; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
        for (int i = lane; i < shares; i += 32) own[i] /= total;
    }
    __syncthreads();
    for (int at = threadIdx.x * 4; at < heads * CHANNELS; at += WARPS * 128) {
        int column = at / CHANNELS, channel = at % CHANNELS;
        const float *from = partial + (row + column) * splits * CHANNELS + channel, *own = weights + column * shares;
        float sum[4] = {};
#pragma unroll 8
        for (int i = 0; i < shares; i++) {
            Floats4 x = load_written4(from + i * CHANNELS);
            for (int j = 0; j < 4; j++) sum[j] += own[i] * x.x[j];
        }
        Words2 rounded = {round_pair<BF16>(sum[0], sum[1]), round_pair<BF16>(sum[2], sum[3])};
        *(Words2*)((u16*)out + (row + column) * CHANNELS + channel) = rounded;
    }
}
