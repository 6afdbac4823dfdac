// What a warp finds of a row: the queries of one sequence and KV head, and what they read.
//
// A lane is 4g + t, and heads 8n + 2t and 8n + 2t + 1 are its own.

struct Tail {
    const u16 *key, *value;  // [tokens, D], position p in row p mod tokens
    int tokens;
};

struct Found {
    int g, t;
    float m[COLUMNS][2];           // the largest score so far, at least, to the exponent of 2
    float acc[COLUMNS][D / 16][4]; // outputs, by head and head again
    float sums[COLUMNS][4];        // others, and Σ p

    // Make room for scores up to `largest` (before `unit`): p stays at most 1.
    __device__ inline void raise(const float (&largest)[COLUMNS][2], const float (&unit)[COLUMNS][2]) {
        bool above = false;
        for (int n = 0; n < COLUMNS; n++)
            for (int e = 0; e < 2; e++) above |= largest[n][e] * unit[n][e] > m[n][e];
        if (!any_lane(above)) return;
        for (int n = 0; n < COLUMNS; n++)
            for (int e = 0; e < 2; e++) {
                float top = largest[n][e];
                for (int mask = 4; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
                top *= unit[n][e];
                float raised = top > m[n][e] ? top + HEADROOM : m[n][e], alpha = exp2_of(m[n][e] - raised);
                m[n][e] = raised;
                for (int i = 0; i < D / 16; i++) {
                    acc[n][i][e] *= alpha;
                    acc[n][i][2 + e] *= alpha;
                }
                sums[n][e] *= alpha;
                sums[n][2 + e] *= alpha;
            }
    }

    __device__ inline void clear() {
        for (int n = 0; n < COLUMNS; n++) {
            m[n][0] = m[n][1] = -1e30f;
            for (int j = 0; j < 4; j++) {
                sums[n][j] = 0;
                for (int i = 0; i < D / 16; i++) acc[n][i][j] = 0;
            }
        }
    }

    // What was found of the row, for another warp: 16 bytes of each lane side by side.
    __device__ inline void give(float* fragment) {
        Floats4* to = (Floats4*)fragment + lane_id();
        for (int n = 0; n < COLUMNS; n++) {
            for (int i = 0; i < D / 16; i++, to += 32) *to = {acc[n][i][0], acc[n][i][1], acc[n][i][2], acc[n][i][3]};
            *to = {sums[n][0], sums[n][1], sums[n][2], sums[n][3]}, to += 32;
            *to = {m[n][0], m[n][1]}, to += 32;
        }
    }

    // And what another has found. `load` reads 16 bytes.
    template <typename Load> __device__ inline void take(const float* fragment, Load load) {
        const float* from = fragment + lane_id() * 4;
        for (int n = 0; n < COLUMNS; n++) {
            Floats4 tops = load(from + (D / 16 + 1) * 128);
            float mine[2], others[2];
            for (int e = 0; e < 2; e++) {
                float top = fmaxf(m[n][e], tops.x[e]);
                mine[e] = exp2_of(m[n][e] - top), others[e] = exp2_of(tops.x[e] - top);
                m[n][e] = top;
            }
            auto add = [&](float (&to)[4]) {
                Floats4 x = load(from);
                for (int j = 0; j < 4; j++) to[j] = to[j] * mine[j % 2] + x.x[j] * others[j % 2];
                from += 128;
            };
            for (int i = 0; i < D / 16; i++) add(acc[n][i]);
            add(sums[n]);
            from += 128;
        }
    }
};
