// A GPU of one program at a time, on a CPU: what warp.cuh gives a kernel, and `run`, which launches KERNEL of the file
// SOURCE.
//
// Each thread of a program is a fiber. What needs a warp or a program waits until all of its threads are there, and what
// is copied to shared memory comes as late as it may (or at once: `eager`), so that a missing wait shows; so do products
// that four warps have under way (or not: `prompt`). Products are summed in float64 and rounded once.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __shared__
#define __launch_bounds__(...)
#define __align__(...)

#include "words.cuh"

using std::max, std::min;
struct Index3 { unsigned x, y, z; };

constexpr int MAX_THREADS = 512, STACK = 1 << 18;
alignas(1024) Words4 dynamic[1 << 14];  // shared memory
static Index3 threadIdx, blockIdx, gridDim;
static int current, num_threads;
static bool eager, prompt;

struct Copy { void* to; const void* from; int bytes; };
struct Product { void (*multiply)(const Product&); float (*d)[4]; u32 a[4]; const u32* held; u64 b; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups;  // of copies under way; the last is open
    std::vector<std::vector<Product>> products;  // likewise
    bool done;
};
static Fiber fibers[MAX_THREADS];
static ucontext_t home;

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
    void wait(int count) {
        unsigned mine = generation;
        arrive(count);
        while (generation == mine) swapcontext(&fibers[current].context, &home);
    }
    void arrive(int count) {
        if (++arrived == count) arrived = 0, generation++;
    }
};
static Barrier warps[MAX_THREADS / 32], program[16];

static void __syncwarp() { warps[current / 32].wait(32); }
static void __syncthreads() { program[0].wait(num_threads); }
static void __threadfence() {}
static int atomicAdd(int* to, int x) { return std::exchange(*to, *to + x); }
static u32 lane_id() { return threadIdx.x % 32; }

template <int N> struct Lanes { u32 x[32][N]; };

// What each lane of a warp gives, for all of them.
template <int N> static Lanes<N> exchange(const u32 (&mine)[N]) {
    static u32 given[MAX_THREADS][8];
    memcpy(given[current], mine, sizeof mine);
    __syncwarp();
    Lanes<N> all;
    for (int i = 0; i < 32; i++) memcpy(all.x[i], given[current / 32 * 32 + i], sizeof mine);
    __syncwarp();
    return all;
}

template <typename To, typename From> static To bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    memcpy(&to, &from, sizeof to);
    return to;
}

static float __uint_as_float(u32 x) { return bits<float>(x); }
static u32 __float_as_uint(float x) { return bits<u32>(x); }

template <bool BFLOAT> static float widen(u16 x) {
    return BFLOAT ? bits<float>((u32)x << 16) : (float)bits<_Float16>(x);
}

template <bool BFLOAT> static u16 rounded(float x) {
    u32 word = bits<u32>(x);
    return BFLOAT ? word + 0x7fff + (word >> 16 & 1) >> 16 : bits<u16>((_Float16)x);
}

template <bool BFLOAT> static u32 round_pair(float low, float high) {
    return rounded<BFLOAT>(low) | (u32)rounded<BFLOAT>(high) << 16;
}

static u32 permute(u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; i++) d |= (u32)(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return d;
}

static float exp2_of(float x) { return exp2f(x); }
static float log2_of(float x) { return log2f(x); }

static u32 multiply(u32 a, u32 b) {
    return round_pair<false>(widen<false>(a) * widen<false>(b), widen<false>(a >> 16) * widen<false>(b >> 16));
}

static u32 negative(u32 x) { return x ^ 0x80008000; }

template <bool BFLOAT> static u32 fused(u32 a, u32 b, u32 c) {
    float d[2];
    for (int e = 0; e < 2; e++)
        d[e] = (double)widen<BFLOAT>(a >> 16 * e) * widen<BFLOAT>(b >> 16 * e) + widen<BFLOAT>(c >> 16 * e);
    return round_pair<BFLOAT>(d[0], d[1]);
}

template <bool BFLOAT> static void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    Lanes<6> all = exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
    float rows[16][16], columns[16][8];
    for (int lane = 0; lane < 32; lane++)
        for (int e = 0; e < 2; e++) {
            int g = lane / 4, depth = lane % 4 * 2 + e;
            for (int i = 0; i < 4; i++) rows[g + i % 2 * 8][depth + i / 2 * 8] = widen<BFLOAT>(all.x[lane][i] >> 16 * e);
            for (int i = 0; i < 2; i++) columns[depth + i * 8][g] = widen<BFLOAT>(all.x[lane][4 + i] >> 16 * e);
        }
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int j = 0; j < 4; j++) {
        double sum = d[j];
        for (int k = 0; k < 16; k++) sum += (double)rows[g + j / 2 * 8][k] * columns[k][2 * t + j % 2];
        d[j] = (float)sum;
    }
}

static u64 shared_matrix(const void* from) { return (uintptr_t)from; }
static u64 behind(u64 matrix, int bytes) { return matrix + bytes; }

template <bool BFLOAT, int WIDE> static void multiply_now(const Product& product) {
    if (memcmp(product.a, product.held, sizeof product.a)) fputs("an operand was replaced\n", stderr), abort();
    Lanes<4> all = exchange(product.a);
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int n = 0; n < 8 * WIDE; n++) {
        if (n % 8 / 2 != t) continue;
        for (int h = 0; h < 2; h++) {
            double sum = product.d[n / 8][2 * h + n % 2];
            for (int k = 0; k < 16; k++) {
                u64 at = product.b + n * 128 + k * 2;
                u16 column = *(const u16*)(at ^ (at >> 7 & 7) << 4);
                sum += (double)widen<BFLOAT>(all.x[g * 4 + k % 8 / 2][k / 8 * 2 + h] >> k % 2 * 16) * widen<BFLOAT>(column);
            }
            product.d[n / 8][2 * h + n % 2] = (float)sum;
        }
    }
}

template <bool BFLOAT, int WIDE> static void multiply_add_async(float (*d)[4], const u32 (&a)[4], u64 b) {
    if (threadIdx.x / 128 * 128 + 128 > num_threads) fputs("four warps multiply\n", stderr), abort();
    fibers[current].products.back().push_back({multiply_now<BFLOAT, WIDE>, d, {a[0], a[1], a[2], a[3]}, a, b});
}

static void settle(float (&d)[4]) {}
static void start_products(u32 (&a)[4]) {}
static void end_products() { fibers[current].products.emplace_back(); }

template <int N> static void await_products() {
    auto& products = fibers[current].products;
    while (products.size() - 1 > (prompt ? 0 : N)) {
        for (auto& product : products[0]) product.multiply(product);
        products.erase(products.begin());
    }
}

static void publish() {}
template <int N> static void keep_registers() {}
template <int N> static void take_registers() {}

static u32 transpose(u32 x) {
    Lanes<1> all = exchange({x});
    int g = lane_id() / 4, t = lane_id() % 4;
    u32 d = 0;
    for (int e = 0; e < 2; e++) d |= (all.x[(2 * t + e) * 4 + g / 2][0] >> g % 2 * 16 & 0xffff) << 16 * e;
    return d;
}

static void read_matrices(u32 (&to)[4], const void* row) {
    if ((uintptr_t)row % 16) fputs("a row is not aligned\n", stderr), abort();
    Lanes<2> all = exchange({(u32)(uintptr_t)row, (u32)((uintptr_t)row >> 32)});
    for (int i = 0; i < 4; i++) {
        const u32* from = all.x[8 * i + lane_id() / 4];
        to[i] = ((const u32*)((u64)from[1] << 32 | from[0]))[lane_id() % 4];
    }
}

template <int N> static void read_transposed(u32 (&to)[N], const void* row) {
    if ((uintptr_t)row % 16) fputs("a row is not aligned\n", stderr), abort();
    Lanes<2> all = exchange({(u32)(uintptr_t)row, (u32)((uintptr_t)row >> 32)});
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int i = 0; i < N; i++) {
        to[i] = 0;
        for (int e = 0; e < 2; e++) {
            const u32* from = all.x[8 * i + 2 * t + e];
            to[i] |= (u32)((const u16*)((u64)from[1] << 32 | from[0]))[g] << 16 * e;
        }
    }
}

static int shuffle(int x, int lane) { return exchange({(u32)x}).x[lane & 31][0]; }
static float shuffle(float x, int lane) { return bits<float>(exchange({bits<u32>(x)}).x[lane & 31][0]); }
static float shuffle_xor(float x, int mask) { return shuffle(x, lane_id() ^ mask); }

static bool any_lane(bool x) {
    Lanes<1> all = exchange({(u32)x});
    return std::any_of(all.x, all.x + 32, [](auto& lane) { return lane[0]; });
}

static void meet(int barrier, int threads) { program[barrier].wait(threads); }
static void arrive(int barrier, int threads) { program[barrier].arrive(threads); }

static bool any_member(int barrier, int threads, bool x) {
    static bool any[16];
    any[barrier] = false;
    meet(barrier, threads);
    any[barrier] |= x;
    meet(barrier, threads);
    x = any[barrier];
    meet(barrier, threads);
    return x;
}

template <int BYTES> static void copy_async_once(void* to, const void* from) {
    if (((uintptr_t)to | (uintptr_t)from) % BYTES) fputs("a copy is not aligned\n", stderr), abort();
    if (eager) memcpy(to, from, BYTES);
    else fibers[current].groups.back().push_back({to, from, BYTES});
}

template <int BYTES> static void copy_async_cached(void* to, const void* from) { copy_async_once<BYTES>(to, from); }
static void copy_async(void* to, const void* from) { copy_async_once<16>(to, from); }

static void copy_async_if(bool inside, void* to, const void* from) {
    static const Words4 zeros = {};
    copy_async(to, inside ? from : &zeros);
}

static void end_group() { fibers[current].groups.emplace_back(); }

template <int N> static void await_groups() {
    auto& groups = fibers[current].groups;
    while ((int)groups.size() - 1 > N) {
        for (auto& copy : groups[0]) memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
    __syncwarp();
}

template <int BYTES> static void read_once(u32* to, const void* from) { read<BYTES>(to, from); }
static void prefetch(const void* from, u32 bytes) {
    if (((uintptr_t)from | bytes) % 16) fputs("a prefetch is not aligned\n", stderr), abort();
}
static float load_written(const float* from) { return *from; }
static Floats4 load_written4(const float* from) { return *(const Floats4*)from; }
static void await_inputs() {}
static void start_next() {}

#include "decode.cuh"
#include "w4a16.cuh"
#include SOURCE

static const void* const* arguments;

template <typename... A, size_t... I> static void call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}

template <typename... A> static void call(void (*kernel)(A...)) { call(kernel, std::index_sequence_for<A...>()); }

static void thread() {
    call(KERNEL);
    fibers[current].done = true;
}

// All programs of a grid, in an order drawn by `seed`, which also says whether copies are eager and products prompt.
extern "C" void run(int x, int y, const void* const* given, int seed) {
    arguments = given, eager = seed % 2, prompt = seed / 2 % 2, num_threads = WARPS * 32, gridDim = {(unsigned)x, (unsigned)y, 1};
    std::vector<unsigned> order(x * y);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    for (unsigned index : order) {
        blockIdx = {index % x, index / x, 0};
        memset(dynamic, 0xff, sizeof dynamic);
        for (int i = 0; i < num_threads; i++) {
            Fiber& fiber = fibers[i];
            fiber.stack.resize(STACK), fiber.groups.assign(1, {}), fiber.products.assign(1, {}), fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = &home;
            makecontext(&fiber.context, thread, 0);
        }
        for (int left = num_threads; left;)
            for (current = 0; current < num_threads; current++)
                if (!fibers[current].done) {
                    threadIdx = {(unsigned)current, 0, 0};
                    swapcontext(&home, &fibers[current].context);
                    left -= fibers[current].done;
                }
    }
}
