// Of mla_decode.cu, tiles of latents: how they lie in shared memory, how they come there, and codes of their words.

constexpr int L = 512, R = 64;             // channels of a latent and of a rope key
constexpr int GROUPS = L / 64;             // of a latent's channels that share a scale
constexpr int PARTS = 8 / BITS;            // codes in a byte
constexpr int ROW = L / PARTS;             // bytes of a latent
constexpr int ROPE_ROW = R * ROPE_BITS / 8;
constexpr int CHUNKS = ROW / 64;           // of a latent's bytes, each of which has a group of every part
constexpr int HEADS = 16;
constexpr int RUN = TOKENS / SCORERS;      // tokens of a warp that scores
constexpr int OCTETS = RUN / 8;
constexpr int STEPS = TOKENS / 16;         // of the second product
constexpr int SPAN = ROW / GATHERERS;      // bytes of a latent of a warp that gathers
constexpr int DRAWN = TOKENS / GATHERERS;  // tokens that it brings to shared memory
constexpr int QUERY_STEPS = (L + R) / 16;
constexpr bool AHEAD = STAGES > 3;         // a tile is scored while weights of the one before are made
constexpr int CHAINS = PARTS < 2 ? 2 : PARTS;  // sums of a chunk: a product waits long for what it adds to

// A stage of the ring, and what else is in shared memory.
constexpr int ROPE = TOKENS * ROW;
constexpr int SCALE = ROPE + TOKENS * ROPE_ROW;
constexpr int ZERO = SCALE + TOKENS * 2 * GROUPS;
constexpr int ROPE_SCALE = ZERO + TOKENS * 2 * GROUPS;  // of the blocks of DRAWN tokens: scales and zeros by channel
constexpr int STAGE = ROPE_SCALE + (ROPE_BITS == 8 ? GATHERERS * 4 * R : 0);
constexpr int QUERY = STAGES * STAGE;                   // operands of the first product, [step][lane]
constexpr int WEIGHTS = QUERY + QUERY_STEPS * 512;      // of the second, [2][step][lane]
constexpr int SCALES = WEIGHTS + 2 * STEPS * 512;       // of pairs of tokens, [2][step][group][t]
constexpr int ALPHAS = SCALES + 2 * STEPS * 256;        // [2][head]: what outputs so far are multiplied by
constexpr int TOPS = ALPHAS + 2 * HEADS * 4;            // [warp][head]
constexpr int SUMS = GROUPS + 1;                        // where gatherers meet, [gatherer][head]: Σ p∘zero by group, Σ p
extern "C" __constant__ const int shared_bytes = TOPS + SCORERS * HEADS * 4;

static_assert(RUN % 16 == 0 && BLOCK % RUN == 0 && BLOCK % DRAWN == 0 && SPAN % 32 == 0);
static_assert(RUN % DRAWN == 0 || DRAWN % RUN == 0);
static_assert(STAGE % 128 == 0 && STAGES >= 3 && RESIDENT <= QUERY_STEPS && WARPS == SCORERS + GATHERERS);

// Barriers: of those that score; and of all, at which one team only arrives: what it says of a buffer, or of tile 0.
constexpr int SCORING = 1, FULL = 2, READY = 4, BEGUN = 6, ALL = WARPS * 32;

// Where bytes of row `row` are moved to, by an exclusive or with their place: eight rows side by side lie in different
// banks, chunk by chunk of 16 bytes, and so do two of them by four chunks.
__device__ inline int swizzle(int row) { return (row & 1) * 64 | (row >> 1 & 3) * 16; }
__device__ inline int rope_swizzle(int row) { return ROPE_BITS == 16 ? (row & 1) * 64 : 0; }

// DRAWN tokens, the `own`-th of a tile; `row` is the first of them, of its block.
__device__ inline void fetch(char* stage, Stream key, Stream value, u64 block, int row, int own) {
    char* run = stage + own * DRAWN * ROW;
    copy<DRAWN * ROW>(run, value.codes + block + row * ROW, [](int at, int lane) {
        return at + (lane ^ swizzle(lane / ROW) ^ swizzle(at / ROW));
    });
    run = stage + ROPE + own * DRAWN * ROPE_ROW;
    copy<DRAWN * ROPE_ROW>(run, key.codes + block + row * ROPE_ROW, [](int at, int lane) {
        return at + (lane ^ rope_swizzle(lane / ROPE_ROW));
    });
    auto plain = [](int at, int lane) { return at + lane; };
    copy<DRAWN * 2 * GROUPS>(stage + SCALE + own * DRAWN * 2 * GROUPS, value.scale + block + row * (2 * GROUPS), plain);
    copy<DRAWN * 2 * GROUPS>(stage + ZERO + own * DRAWN * 2 * GROUPS, value.zero + block + row * (2 * GROUPS), plain);
    if constexpr (ROPE_BITS == 8) {
        copy<2 * R>(stage + ROPE_SCALE + own * (4 * R), key.scale + block, plain);
        copy<2 * R>(stage + ROPE_SCALE + own * (4 * R) + 2 * R, key.zero + block, plain);
    }
}

// Bytes 0 and 2, 1 and 3 of a word: of 8 bits as they are, of less with all of their parts.
__device__ inline void halves(u32 (&to)[2], u32 word) {
    if constexpr (BITS == 8) to[0] = permute(word, 0, 0x4240), to[1] = permute(word, 0, 0x4341);
    else to[0] = word, to[1] = word >> 8;
}
__device__ inline u32 code(u32 half, int part) { return BITS == 8 ? half : half & code_mask(BITS, part); }

// Ask for rows of the tail, those of positions from `near` to `end`.
__device__ inline void prefetch_tail(const u16* key, const u16* value, int near, int end, int tail_tokens) {
    while (near < end) {
        const int row = near % tail_tokens, rows = min(end - near, tail_tokens - row);
        prefetch(key + row * R, rows * R * 2);
        prefetch(value + row * L, rows * L * 2);
        near += rows;
    }
}

// Where a thread is.
struct Place {
    char* shared;
    int warp, lane, g, t;  // the warp is one of its team
};
