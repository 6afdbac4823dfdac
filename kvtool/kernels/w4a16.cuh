// What kernels share that decode 4-bit weights in registers.
//
// Of a word of `pack_w4`, bits 4s + 8j and 4s + 8j + 16 begin the codes of a lane's columns 2t + 8j + 16s and the one behind.

constexpr u32 SIGNS = 0x80008000;  // of both, and -0 twice
template <bool BFLOAT> constexpr u32 ONES = BFLOAT ? 0x3f803f80 : 0x3c003c00;

// A nibble under the upper byte of a power of two is a bf16 of 128 + code (an fp16 of 1,024 + code), exactly.
template <bool BFLOAT> constexpr float OFFSET = BFLOAT ? 128 : 1024;
template <bool BFLOAT> constexpr u32 OFFSETS = BFLOAT ? 0x43004300 : 0x64006400;

// OFFSET + code of two columns; `upper` is that power's upper byte, four times.
template <bool BFLOAT> constexpr u32 UPPER = OFFSETS<BFLOAT> >> 8 | OFFSETS<BFLOAT>;
template <bool BFLOAT> __device__ inline u32 code_pair(u32 word, int s, int j, u32 upper = UPPER<BFLOAT>) {
    return permute(word >> 4 * s & 0x0f0f0f0f, upper, j ? 0x4341 : 0x4240);
}

// Without a power of two above them, bits 0 to 7 count in units of the least number there is, 2^-133 (2^-24). Codes of
// bits 0 to 3 times RAISE, and those of bits 4 to 7 times RAISE_HIGH, are in units of LOWERED, 2^-13 (2^-9), of which
// RAISE_LOWERED makes ones.
template <bool BFLOAT> constexpr u32 RAISE = BFLOAT ? 0x7b807b80 : 0x78007800;
template <bool BFLOAT> constexpr u32 RAISE_HIGH = BFLOAT ? 0x79807980 : 0x68006800;
template <bool BFLOAT> constexpr u32 LOWERED = BFLOAT ? 0x39003900 : 0x18001800;
template <bool BFLOAT> constexpr u32 RAISE_LOWERED = BFLOAT ? 0x46004600 : 0x60006000;

// LOWERED codes of two columns, and `more` of these.
template <bool BFLOAT> __device__ inline u32 lowered_pair(u32 word, int s, int j, u32 more) {
    return s ? fused<BFLOAT>(word >> 8 * j & 0x00f000f0, RAISE_HIGH<BFLOAT>, more)
             : fused<BFLOAT>(word >> 8 * j & 0x000f000f, RAISE<BFLOAT>, more);
}
