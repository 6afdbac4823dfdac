// What decode kernels share: packed streams.

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
