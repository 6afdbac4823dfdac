// What kernels share that decode 4-bit weights in registers.
//
// A nibble under the upper byte of a power of two is a bf16 of 128 + code (an fp16 of 1,024 + code), exactly.

template <bool BFLOAT> constexpr float OFFSET = BFLOAT ? 128 : 1024;
template <bool BFLOAT> constexpr u32 ONES = BFLOAT ? 0x3f803f80 : 0x3c003c00;

// OFFSET + code of bytes 2j and 2j + 1 of a word: of their low nibbles, or their high ones.
template <bool BFLOAT> __device__ inline u32 code_pair(u32 word, int high, int j) {
    return permute(word >> 4 * high & 0x0f0f0f0f, BFLOAT ? 0x43434343 : 0x64646464, j ? 0x4342 : 0x4140);
}
