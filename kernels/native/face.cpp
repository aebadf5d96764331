// One operation a call, each with a team of its own. `half`: numbers are bf16 where they may be, else float.
#include <cstdlib>
#include <sys/mman.h>

#include "ops.h"

static const int64_t ALONE = 32;  // tokens that one thread does sooner than several, where little is done to each

extern "C" int64_t pando_panel() { return PANEL; }

extern "C" int64_t pando_has_bf16() { return HAS_BF16; }

// Ask for large pages under [begin, begin + bytes): a hint.
extern "C" void pando_large_pages(char *begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const int64_t page = 4096, skipped = (page - (int64_t)begin % page) % page;
    if (bytes > skipped) madvise(begin + skipped, (bytes - skipped) / page * page, MADV_HUGEPAGE);
#endif
}

#if HAS_BF16
#define DO(operation)                \
    if (half) {                      \
        using T = bf16;              \
        operation;                   \
    } else {                         \
        using T = float;             \
        operation;                   \
    }
#else
#define DO(operation)                \
    {                                \
        using T = float;             \
        operation;                   \
    }
#endif

extern "C" void pando_linear(const void *x, const Packed *weight, float *out, int64_t rows, int64_t threads,
                             int64_t half) {
#pragma omp parallel num_threads(threads)
    DO(linear<T>((const float *)x, weight->depth, *weight, out, rows))
}

extern "C" void pando_gated_linear(const void *x, const Packed *weight, void *out, int64_t rows, int64_t threads,
                                   int64_t half) {
#pragma omp parallel num_threads(threads)
    DO(gated_linear<T>((const float *)x, weight->depth, *weight, (T *)out, rows))
}

extern "C" void pando_norm(const float *x, float *residual, const float *weight, float *out, int64_t rows,
                           int64_t width, float eps, int64_t threads) {
#pragma omp parallel num_threads(threads) if (rows > ALONE)
    norm<float>(x, residual, weight, out, rows, width, eps);
}

extern "C" void pando_rotary_write(float *heads, const float *cos, const float *sin, float *cache, const int64_t *slots,
                                   int64_t rows, const Shape *of, int64_t threads) {
#pragma omp parallel num_threads(threads) if (rows > ALONE)
    rotary_write<float>(heads, cos, sin, nullptr, 0, cache, slots, rows, *of);
}

// Returns 0, or 1 where there is no memory. `cache` is the layer's first element, of the kind that `out` is.
extern "C" int pando_attention(const float *query, int64_t q_stride, const void *cache, const Teams *teams,
                               const Shape *of, void *out, int64_t threads, int64_t half) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *room = attention_room(teams->most_rows, *of);
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) DO(attention<T>(query, q_stride, (const T *)cache, *teams, *of, room, (T *)out))
        free(room);
    }
    return failed;
}
