// What a warp can do that C++ has no words for.

__device__ inline u32 lane_id() { return threadIdx.x % 32; }

// Bytes of (b:a) as the nibbles of `selector` say, the lowest first.
__device__ inline u32 permute(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

__device__ inline float exp2_of(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

__device__ inline float log2_of(float x) {
    float d;
    asm("lg2.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// Two products of fp16.
__device__ inline u32 multiply(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ inline u32 negative(u32 x) {
    u32 d;
    asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(x));
    return d;
}

// Two of a · b + c, each rounded once.
template <bool BFLOAT> __device__ inline u32 fused(u32 a, u32 b, u32 c) {
    u32 d;
    if constexpr (BFLOAT) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <bool BFLOAT> __device__ inline u32 round_pair(float low, float high) {
    u32 d;
    if constexpr (BFLOAT) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

template <bool BFLOAT> __device__ inline float widen(u16 x) {
    float d;
    if constexpr (BFLOAT) d = __uint_as_float((u32)x << 16);
    else asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
    return d;
}

// d += a · b: 16 rows, 16 deep, 8 columns. Lane 4g + t holds of `a` rows g, g + 8, g, g + 8 at depths 2t, 2t, 2t + 8,
// 2t + 8 (and the one behind each), of `b` column g at depths 2t and 2t + 8, of `d` row g and then row g + 8 in columns
// 2t and 2t + 1.
template <bool BFLOAT> __device__ inline void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (BFLOAT)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// What four warps multiply at once (sm_90a): d += a · b, each warp's own `a`, as above, with the same `b` of 8 WIDE columns,
// a `shared_matrix`. It is under way until it is awaited; until then nobody else may use `d` and `a`, nor change `b`.
#define FOUR(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define SIXTEEN(d) FOUR((d)[0]), FOUR((d)[1]), FOUR((d)[2]), FOUR((d)[3])
#define SUMS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_32 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_64                                                                                                        \
    SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "    \
            "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_128                                                                                                       \
    SUMS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "   \
            "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "       \
            "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "   \
            "%120, %121, %122, %123, %124, %125, %126, %127"
#define MULTIPLY_ASYNC(COLUMNS, TYPE, SUMS, A, B, ...)                                                                 \
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "."   \
        TYPE " {" SUMS "}, {" A "}, " B ", p, 1, 1, 0; }"                                                              \
        : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MULTIPLY_ASYNC_WIDE(TYPE)                                                                                      \
    if constexpr (WIDE == 4) MULTIPLY_ASYNC("32", TYPE, SUMS_16, "%16, %17, %18, %19", "%20", SIXTEEN(d));             \
    else if constexpr (WIDE == 8)                                                                                      \
        MULTIPLY_ASYNC("64", TYPE, SUMS_32, "%32, %33, %34, %35", "%36", SIXTEEN(d), SIXTEEN(d + 4));                  \
    else if constexpr (WIDE == 16)                                                                                     \
        MULTIPLY_ASYNC("128", TYPE, SUMS_64, "%64, %65, %66, %67", "%68", SIXTEEN(d), SIXTEEN(d + 4), SIXTEEN(d + 8),  \
                       SIXTEEN(d + 12));                                                                               \
    else                                                                                                               \
        MULTIPLY_ASYNC("256", TYPE, SUMS_128, "%128, %129, %130, %131", "%132", SIXTEEN(d), SIXTEEN(d + 4),            \
                       SIXTEEN(d + 8), SIXTEEN(d + 12), SIXTEEN(d + 16), SIXTEEN(d + 20), SIXTEEN(d + 24),             \
                       SIXTEEN(d + 28))
template <bool BFLOAT, int WIDE>
__device__ inline void multiply_add_async(float (*d)[4], const u32 (&a)[4], u64 b) {
    static_assert(WIDE == 4 || WIDE == 8 || WIDE == 16 || WIDE == 32);
    if constexpr (BFLOAT) { MULTIPLY_ASYNC_WIDE("bf16"); }
    else { MULTIPLY_ASYNC_WIDE("f16"); }
}

// A second operand in shared memory, 16 deep: column n's 32 bytes are 128 n from the first one's, and of each multiple of
// 1,024 bytes those 16 numbered p of the 128 numbered q lie where p ^ q would.
__device__ inline u64 shared_matrix(const void* from) {
    u64 address = (u32)__cvta_generic_to_shared(from) >> 4 & 0x3fff;
    return address | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// That which lies so many bytes behind another.
__device__ inline u64 behind(u64 matrix, int bytes) { return matrix >> 32 << 32 | ((u32)matrix + bytes / 16); }

// Registers that products under way have used, or will, are what they are by now.
__device__ inline void settle(float (&d)[4]) { asm volatile("" : FOUR(d) : : "memory"); }
__device__ inline void start_products(u32 (&a)[4]) {
    asm volatile("wgmma.fence.sync.aligned;" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]) : : "memory");
}
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ inline void await_products() {  // all but the newest N groups
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Of a program's registers, those that four warps do not keep are there for four others to take (sm_90a): N each, by now.
template <int N> __device__ inline void keep_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// Let such products see what this thread has written to shared memory.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Lane 4g + t gives elements 2t and 2t + 1 of row g of an 8 × 8 matrix, and gets those of its transpose.
__device__ inline u32 transpose(u32 x) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
    return d;
}

// 8 × 8 matrices of 16 bits: lane 8i + j says where row j of matrix i is, and lane 4g + t gets of each elements 2t and
// 2t + 1 of row g.
__device__ inline void read_matrices(u32 (&to)[4], const void* row) {
    u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// 8 × 8 matrices of 16 bits, transposed, as a product wants them: lane 8i + j says where row j of matrix i is, and lane
// 4g + t gets of each matrix column g of rows 2t and 2t + 1.
__device__ inline void read_transposed(u32 (&to)[2], const void* row) {
    u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
        : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
}
__device__ inline void read_transposed(u32 (&to)[4], const void* row) {
    u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

__device__ inline float shuffle(float x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
__device__ inline int shuffle(int x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
__device__ inline bool any_lane(bool x) { return __any_sync(0xffffffff, x); }

// Barriers of some warps of a program, by number, 0 being that of all: `threads` come, and those that meet wait for all.
__device__ inline void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline bool any_member(int barrier, int threads, bool x) {  // of those that meet
    int any;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %3, 0; bar.red.or.pred p, %1, %2, p; selp.s32 %0, 1, 0, p; }"
        : "=r"(any) : "r"(barrier), "r"(threads), "r"((int)x) : "memory");
    return any;
}

// 16 bytes from global to shared memory, on their way until their group is awaited.
__device__ inline void copy_async(void* to, const void* from) {
    u32 shared = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

// As above, so many bytes that are read this once: of 16 the rest of a line of 128 comes to the L2 cache.
template <int BYTES> __device__ inline void copy_async_once(void* to, const void* from) {
    u32 shared = (u32)__cvta_generic_to_shared(to);
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(BYTES) : "memory");
}

// As above, so many bytes that the multiprocessor's own cache keeps.
template <int BYTES> __device__ inline void copy_async_cached(void* to, const void* from) {
    u32 shared = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(BYTES) : "memory");
}

// 16 bytes where `inside`, else as many zeros. The rest of a line of 128 bytes comes to the L2 cache.
__device__ inline void copy_async_if(bool inside, void* to, const void* from) {
    u32 shared = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the newest `N` groups have come, those of the other lanes too.
template <int N> __device__ inline void await_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
    __syncwarp();
}

// `BYTES` that are read this once.
template <int BYTES> __device__ inline void read_once(u32* to, const void* from) {
    if constexpr (BYTES == 16)
        asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
    else if constexpr (BYTES == 8)
        asm("ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
    else asm("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}

// Ask for so much memory, whole 16 bytes, to come to the L2 cache.
__device__ inline void prefetch(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// What another program has written, past this multiprocessor's own cache.
__device__ inline float load_written(const float* from) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
}
__device__ inline Floats4 load_written4(const float* from) {
    Floats4 d;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(d.x[0]), "=f"(d.x[1]), "=f"(d.x[2]), "=f"(d.x[3]) : "l"(from) : "memory");
    return d;
}

__device__ inline void await_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
