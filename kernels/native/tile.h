// The vector type of the machine, and the one small matrix product that everything here is made of.
//
// A number of a product's inputs is a `float`, or a `bf16`: then two that follow one another make one 32-bit word, and
// words are what is moved, counted and multiplied. Sums are float in both.
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
#if defined(__AVX512BF16__)
#include <immintrin.h>
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif
#define PANEL (2 * LANES)  // columns of a packed panel
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
struct bf16 {
    uint16_t bits;
};

// Numbers of type T in a word.
template <class T>
constexpr int64_t PER_WORD = 4 / sizeof(T);

INLINE vec load(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, vec value) { memcpy(to, &value, sizeof value); }

// The bits of `value` in all lanes, whatever they mean.
INLINE vec splat(float value) {
#define FOUR value, value, value, value
#if LANES == 16
    return vec{FOUR, FOUR, FOUR, FOUR};
#else
    return vec{FOUR, FOUR};
#endif
#undef FOUR
}

INLINE float as_float(float value) { return value; }

INLINE float as_float(bf16 value) {
    const uint32_t bits = (uint32_t)value.bits << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

INLINE void put(float *to, float value) { *to = value; }

// To the nearest, ties to even; what is no number stays none.
INLINE void put(bf16 *to, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t up = bits + 0x7fff + (bits >> 16 & 1);
    to->bits = (value == value ? up : bits | 0x400000) >> 16;
}

INLINE void store(bf16 *to, vec value) {
#if HAS_BF16
    const __m256bh near = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &near, sizeof near);
#else
    for (int lane = 0; lane < LANES; lane++) put(to + lane, value[lane]);
#endif
}

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

// 2^x for x up to 127 to about one unit in the last place, exactly 1 at 0; next to nothing below -126.
INLINE vec power_of_two(vec x) {
    x = larger(x, splat(-126.0f));
    const vec magic = splat(12582912.0f), shifted = x + magic;
    const ivec whole = (ivec)shifted - (ivec)magic;
    x = x - (shifted - magic);
    vec p = splat(1.54569915e-4f);
    p = p * x + 1.33856555e-3f;
    p = p * x + 9.61806832e-3f;
    p = p * x + 5.55036742e-2f;
    p = p * x + 2.40226509e-1f;
    p = p * x + 6.93147186e-1f;
    p = p * x + 1.0f;
    return (vec)((ivec)p + (whole << 23));
}

INLINE vec silu(vec x) {
    vec turns = x * -1.44269504f;
    turns = turns < 127.0f ? turns : splat(127.0f);
    return x / (power_of_two(turns) + 1.0f);
}

// `x` and `y` word by word into `sum`.
template <class T>
INLINE vec multiply_add(vec x, vec y, vec sum) {
#if HAS_BF16
    if constexpr (sizeof(T) == 2) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#endif
    return x * y + sum;
}

// `into[r][c] = a[r][:] . b[:, c]` for PANEL columns; with `keep`, `into[r][c] * keep[r] +` that. Strides and depth are
// in words. FETCH: `b` comes from far away, and what is next of it is asked for ahead.
template <int ROWS, class T, bool FETCH>
INLINE void tile(const float *a, int64_t a_stride, const float *b, int64_t depth, float *into, int64_t stride,
                 const float *keep) {
    vec sum[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = vec{};
    for (int64_t k = 0; k < depth; k++) {
        const vec left = load(b), right = load(b + LANES);
        if (FETCH) {
            __builtin_prefetch(b + 64 * PANEL);
            __builtin_prefetch(b + 64 * PANEL + LANES);
        }
        b += PANEL;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const vec x = splat(a[r * a_stride + k]);
            sum[r][0] = multiply_add<T>(x, left, sum[r][0]);
            sum[r][1] = multiply_add<T>(x, right, sum[r][1]);
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

template <int ROWS, class T, bool FETCH>
static void tile_of(int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t depth, float *into,
                    int64_t stride, const float *keep) {
    if (rows == ROWS) {
        tile<ROWS, T, FETCH>(a, a_stride, b, depth, into, stride, keep);
    } else if constexpr (ROWS > 1) {
        tile_of<ROWS - 1, T, FETCH>(rows, a, a_stride, b, depth, into, stride, keep);
    }
}

// `tile` for any number of rows.
template <class T, bool FETCH>
INLINE void tiles(int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t depth, float *into,
                  int64_t stride, const float *keep) {
    for (int64_t row = 0; row < rows; row += MOST_ROWS) {
        const int64_t some = rows - row < MOST_ROWS ? rows - row : MOST_ROWS;
        tile_of<MOST_ROWS, T, FETCH>(some, a + row * a_stride, a_stride, b, depth, into + row * stride, stride,
                                     keep ? keep + row : nullptr);
    }
}
