// Registers, and how memory comes to them. Packed pairs are `u32`, the earlier element low.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) Words2 { u32 x[2]; };
struct alignas(16) Words4 { u32 x[4]; };
struct alignas(16) Floats4 { float x[4]; };

template <int BYTES> __device__ inline void read(u32* to, const void* from) {
    if constexpr (BYTES > 16) {
        for (int at = 0; at < BYTES; at += 16) read<16>(to + at / 4, (const char*)from + at);
    } else if constexpr (BYTES == 16) {
        Words4 x = *(const Words4*)from;
        for (int i = 0; i < 4; i++) to[i] = x.x[i];
    } else if constexpr (BYTES == 8) {
        Words2 x = *(const Words2*)from;
        for (int i = 0; i < 2; i++) to[i] = x.x[i];
    } else if constexpr (BYTES == 4) {
        *to = *(const u32*)from;
    } else {
        *to = *(const u16*)from;
    }
}
