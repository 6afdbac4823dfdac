// 4-bit weights as 16-bit ones, for `w4a16_kernels.py`.
//
// A thread writes 8 columns of an output at a time; the four threads that write a run of 32 (`pack_w4`) all read it.

constexpr int THREADS = 32 * WARPS, ACROSS = COLUMNS / 8;  // threads that share an output
extern "C" __constant__ const int shared_bytes = 0;

extern "C" __global__ void __launch_bounds__(THREADS) w4a16_decode(
    const char* weight, // [outputs, depth / 2]
    const u16* scales,  // [depth / GROUP], `stride` apart, [outputs]
    const u16* zeros,
    u16* out,           // [outputs, depth]
    int outputs,
    int stride,
    int depth
) {
    const int column = blockIdx.y * COLUMNS + threadIdx.x % ACROSS * 8, s = threadIdx.x / 2 % 2, j = threadIdx.x % 2;
    if (CHAINED) {
        start_next();
        await_inputs();
    }
    if (column >= depth) return;
#pragma unroll
    for (int i = 0; i < LINES; i += THREADS / ACROSS) {
        const int at = blockIdx.x * LINES + threadIdx.x / ACROSS + i, output = min(at, outputs - 1);
        u32 words[4], weights[4];
        read_once<16>(words, weight + ((u64)output * depth + column / 32 * 32) / 2);
        const u64 group = (u64)(column / GROUP) * stride + output;
        const u32 scale = scales[group] * 0x10001u, zero = zeros[group] * 0x10001u;
        for (int t = 0; t < 4; t++) {
            u32 code = fused<BF16>(code_pair<BF16>(words[t], s, j), ONES<BF16>, OFFSETS<BF16> ^ SIGNS);
            weights[t] = fused<BF16>(fused<BF16>(zero, ONES<BF16> ^ SIGNS, code), scale, SIGNS);
        }
        if (at < outputs)
            *(Words4*)(out + (u64)at * depth + column) = {weights[0], weights[1], weights[2], weights[3]};
    }
}
