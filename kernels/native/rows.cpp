// What is done to each token alone: embedding, norms, rotation and the write to the cache.
#include <cmath>

#include "ops.h"

static const int64_t AT_ONCE = 32;  // tokens that make a part worth handing out

// `each(token)` of all tokens.
template <class Each>
INLINE void tokens(int64_t rows, int64_t threads, Each each) {
    parts((rows + AT_ONCE - 1) / AT_ONCE, threads, [&](int64_t index) {
        const int64_t first = index * AT_ONCE, end = first + AT_ONCE < rows ? first + AT_ONCE : rows;
        for (int64_t row = first; row < end; row++) each(row);
    });
}

template <class T>
void embed(const T *table, const int64_t *ids, float *out, int64_t rows, int64_t width, int64_t threads) {
    tokens(rows, threads, [&](int64_t row) {
        const T *from = table + ids[row] * width;
        for (int64_t c = 0; c < width; c++) out[row * width + c] = as_float(from[c]);
    });
}

template <class T>
void angles(const Frequencies &frequencies, const int64_t *positions, float *cos, float *sin, int64_t rows, int64_t dim,
            int64_t threads) {
    const int64_t half = dim / 2;
    tokens(rows, threads, [&](int64_t row) {
        float *c = cos + row * dim, *s = sin + row * dim;
        for (int64_t d = 0; d < half; d++) {
            const double angle = frequencies.exact ? positions[row] * frequencies.of[d]
                                                   : (float)positions[row] * (float)frequencies.of[d];
            // In the model's own type, as models are trained.
            T near_cos, near_sin;
            put(&near_cos, (float)(frequencies.exact ? std::cos(angle) : cosf((float)angle)));
            put(&near_sin, (float)(frequencies.exact ? std::sin(angle) : sinf((float)angle)));
            c[d] = c[half + d] = as_float(near_cos);
            s[half + d] = as_float(near_sin);
            s[d] = -s[half + d];
        }
    });
}

INLINE float inverse_root_mean_square(const float *x, int64_t width, float eps) {
    vec squares{};
    float rest = 0;
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) squares = load(x + c) * load(x + c) + squares;
    for (; c < width; c++) rest += x[c] * x[c];
    return 1 / sqrtf((lanes_sum(squares) + rest) / (float)width + eps);
}

template <class T>
void norm(const float *x, float *residual, const float *weight, T *out, int64_t rows, int64_t width, float eps,
          int64_t threads) {
    tokens(rows, threads, [&](int64_t row) {
        float *here = residual + row * width;
        T *into = out + row * width;
        if (x)
            for (int64_t c = 0; c < width; c++) here[c] += x[row * width + c];
        const float by = inverse_root_mean_square(here, width, eps);
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) store(into + c, load(here + c) * by * load(weight + c));
        for (; c < width; c++) put(into + c, here[c] * by * weight[c]);
    });
}

template <class T>
void rotary_write(float *heads, const float *cos, const float *sin, const float *norms, float eps, T *cache,
                  const int64_t *slots, int64_t rows, const Shape &of, int64_t threads) {
    const int64_t queries = of.num_heads, keys = of.num_kv_heads, dim = of.head_dim, half = dim / 2;
    tokens(rows, threads, [&](int64_t row) {
        const float *c = cos + row * dim, *s = sin + row * dim;
        T *slot = cache + slots[row] / of.block_size * of.block_stride + slots[row] % of.block_size * dim;
        for (int64_t head = 0; head < queries + 2 * keys; head++) {
            float *from = heads + (row * (queries + 2 * keys) + head) * dim;
            T *into = slot + (head - queries) * of.block_size * dim;
            if (head < queries + keys) {
                if (norms) {
                    const float by = inverse_root_mean_square(from, dim, eps);
                    for (int64_t d = 0; d < dim; d++) from[d] = from[d] * by * norms[head * dim + d];
                }
                for (int64_t d = 0; d < half; d++) {
                    const float a = from[d], b = from[half + d];
                    from[d] = a * c[d] + b * s[d];
                    from[half + d] = b * c[half + d] + a * s[half + d];
                }
            }
            if (head >= queries)
                for (int64_t d = 0; d < dim; d++) put(into + d, from[d]);
        }
    });
}

#define FOR(T)                                                                                               \
    template void embed<T>(const T *, const int64_t *, float *, int64_t, int64_t, int64_t);                  \
    template void angles<T>(const Frequencies &, const int64_t *, float *, float *, int64_t, int64_t, int64_t); \
    template void norm<T>(const float *, float *, const float *, T *, int64_t, int64_t, float, int64_t);     \
    template void rotary_write<T>(float *, const float *, const float *, const float *, float, T *,          \
                                  const int64_t *, int64_t, const Shape &, int64_t);
FOR(float)
#if HAS_BF16
FOR(bf16)
#endif
