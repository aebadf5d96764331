// `x @ weight.T + bias` over a weight packed in panels, for one row as for many.
#include <algorithm>

#include "ops.h"

// Rows whose inputs stay in a core's cache while the panels pass by: a multiple of every MOST_ROWS.
static const int64_t ROWS_AT_ONCE = 96;
// With few rows, where reading the panels is what takes time, a thread takes so many floats of them that follow one
// another, if that leaves some parts for each: what it asks for ahead is its own then, and not the next thread's.
static const int64_t RUN = 32768, PARTS_EACH = 2;

// `finish(first row, rows, panel, sums[rows][PANEL])` for every part of the product.
template <class T, class Finish>
INLINE void product(const float *x, int64_t x_stride, const Packed &weight, int64_t rows, int64_t threads,
                    Finish finish) {
    const int64_t num_panels = (weight.columns + PANEL - 1) / PANEL, size = weight.depth * PANEL;
    const int64_t groups = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const int64_t fair = std::max<int64_t>(num_panels / (PARTS_EACH * threads), 1);
    const int64_t run = groups > 1 ? 1 : std::clamp<int64_t>(RUN / size, 1, fair);
    const int64_t runs = (num_panels + run - 1) / run;
    parts(groups * runs, threads, [&](int64_t index) {
        const int64_t first = index / runs * ROWS_AT_ONCE, begin = index % runs * run;
        const int64_t some = rows - first < ROWS_AT_ONCE ? rows - first : ROWS_AT_ONCE;
        float sums[ROWS_AT_ONCE * PANEL];
        for (int64_t panel = begin; panel < begin + run && panel < num_panels; panel++) {
            tiles<T, true>(some, x + first * x_stride, x_stride, weight.panels + panel * size, weight.depth, sums, PANEL,
                           nullptr);
            finish(first, some, panel, sums);
        }
    });
}

template <class T, bool ADD>
INLINE void linear_to(const float *x, int64_t x_stride, const Packed &weight, float *out, int64_t rows, int64_t threads) {
    product<T>(x, x_stride, weight, rows, threads, [&](int64_t first, int64_t some, int64_t panel, const float *sums) {
        const int64_t column = panel * PANEL, left = weight.columns - column, width = left < PANEL ? left : PANEL;
        for (int64_t row = 0; row < some; row++) {
            float *into = out + (first + row) * weight.columns + column;
            for (int64_t c = 0; c < width; c++) {
                const float value = sums[row * PANEL + c] + (weight.bias ? weight.bias[column + c] : 0.0f);
                into[c] = ADD ? into[c] + value : value;
            }
        }
    });
}

template <class T>
void linear(const float *x, int64_t x_stride, const Packed &weight, float *out, int64_t rows, int64_t threads) {
    linear_to<T, false>(x, x_stride, weight, out, rows, threads);
}

template <class T>
void add_linear(const float *x, int64_t x_stride, const Packed &weight, float *out, int64_t rows, int64_t threads) {
    linear_to<T, true>(x, x_stride, weight, out, rows, threads);
}

template <class T>
void gated_linear(const float *x, int64_t x_stride, const Packed &weight, T *out, int64_t rows, int64_t threads) {
    const int64_t columns = weight.columns / 2;
    // Panels are counted by their gates and ups together.
    const Packed padded{weight.panels, nullptr, (columns + LANES - 1) / LANES * PANEL, weight.depth};
    product<T>(x, x_stride, padded, rows, threads, [&](int64_t first, int64_t some, int64_t panel, const float *sums) {
        const int64_t column = panel * LANES, left = columns - column, width = left < LANES ? left : LANES;
        vec gate_bias{}, up_bias{};
        for (int64_t c = 0; weight.bias && c < width; c++) {
            gate_bias[c] = weight.bias[column + c];
            up_bias[c] = weight.bias[columns + column + c];
        }
        for (int64_t row = 0; row < some; row++) {
            const vec gate = load(sums + row * PANEL) + gate_bias, up = load(sums + row * PANEL + LANES) + up_bias;
            const vec value = silu(gate) * up;
            T *into = out + (first + row) * columns + column;
            if (width == LANES) {
                store(into, value);
            } else {
                for (int64_t c = 0; c < width; c++) put(into + c, value[c]);
            }
        }
    });
}

#define FOR(T)                                                                                     \
    template void linear<T>(const float *, int64_t, const Packed &, float *, int64_t, int64_t);     \
    template void add_linear<T>(const float *, int64_t, const Packed &, float *, int64_t, int64_t); \
    template void gated_linear<T>(const float *, int64_t, const Packed &, T *, int64_t, int64_t);
FOR(float)
#if HAS_BF16
FOR(bf16)
#endif
