// The vector type of the machine, and the one small matrix product that everything here is made of.
//
// Invariant: an element of a product is one chain of multiply-adds in order of k, whatever the number of rows beside
// it, so a row's result does not depend on the rest of the batch.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define LANES 16
#define MOST_ROWS 12
#else
#define LANES 8
#define MOST_ROWS 6
#endif
#define PANEL (2 * LANES)  // columns of a packed panel
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, vec value) { memcpy(to, &value, sizeof value); }

INLINE vec splat(float value) { return vec{} + value; }

INLINE ivec iota() {
    ivec lanes{};
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    return lanes;
}

INLINE vec larger(vec a, vec b) { return a > b ? a : b; }

INLINE float lanes_max(vec x) {
    for (int step = LANES / 2; step; step /= 2) x = larger(x, __builtin_shuffle(x, iota() ^ step));
    return x[0];
}

INLINE float lanes_sum(vec x) {
    for (int step = LANES / 2; step; step /= 2) x = x + __builtin_shuffle(x, iota() ^ step);
    return x[0];
}

// e^x to about one unit in the last place, exactly 1 at 0; next to nothing below -87, of no more than e^88.
INLINE vec exponential(vec x) {
    x = larger(x, splat(-87.0f));
    x = x < 88.0f ? x : splat(88.0f);
    const vec magic = splat(12582912.0f);
    vec turns = x * 1.44269504f + magic;
    ivec power = (ivec)turns - (ivec)magic;
    turns = turns - magic;
    x = x - turns * 0.693359375f;
    x = x + turns * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    return (vec)((ivec)p + (power << 23));
}

// `into[r][c] = a[r][:] . b[:, c]` for PANEL columns; with `keep`, `into[r][c] * keep[r] +` that.
template <int ROWS>
INLINE void tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth, float *into,
                 int64_t stride, const float *keep) {
    vec sum[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = vec{};
    for (int64_t k = 0; k < depth; k++) {
        const vec left = load(b), right = load(b + LANES);
        __builtin_prefetch(b + 16 * PANEL);
        __builtin_prefetch(b + 16 * PANEL + LANES);
        b += b_stride;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const vec x = splat(a[r * a_stride + k]);
            sum[r][0] = x * left + sum[r][0];
            sum[r][1] = x * right + sum[r][1];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        float *row = into + r * stride;
        if (keep) {
            sum[r][0] = load(row) * keep[r] + sum[r][0];
            sum[r][1] = load(row + LANES) * keep[r] + sum[r][1];
        }
        store(row, sum[r][0]);
        store(row + LANES, sum[r][1]);
    }
}

template <int ROWS>
static void tile_of(int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
                    float *into, int64_t stride, const float *keep) {
    if (rows == ROWS) {
        tile<ROWS>(a, a_stride, b, b_stride, depth, into, stride, keep);
    } else if constexpr (ROWS > 1) {
        tile_of<ROWS - 1>(rows, a, a_stride, b, b_stride, depth, into, stride, keep);
    }
}

// `tile` for any number of rows.
INLINE void tiles(int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
                  float *into, int64_t stride, const float *keep) {
    for (int64_t row = 0; row < rows; row += MOST_ROWS) {
        const int64_t some = rows - row < MOST_ROWS ? rows - row : MOST_ROWS;
        tile_of<MOST_ROWS>(some, a + row * a_stride, a_stride, b, b_stride, depth, into + row * stride, stride,
                           keep ? keep + row : nullptr);
    }
}
