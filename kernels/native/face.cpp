// One operation a call. `half`: numbers are bf16 where they may be, else float.
#include <sys/mman.h>

#include "ops.h"

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
    DO(linear<T>((const float *)x, weight->depth, *weight, out, rows, threads))
}

extern "C" void pando_gated_linear(const void *x, const Packed *weight, void *out, int64_t rows, int64_t threads,
                                   int64_t half) {
    DO(gated_linear<T>((const float *)x, weight->depth, *weight, (T *)out, rows, threads))
}

extern "C" void pando_norm(const float *x, float *residual, const float *weight, float *out, int64_t rows,
                           int64_t width, float eps, int64_t threads) {
    norm<float>(x, residual, weight, out, rows, width, eps, threads);
}

extern "C" void pando_rotary_write(float *heads, const float *cos, const float *sin, float *cache, const int64_t *slots,
                                   int64_t rows, const Shape *of, int64_t threads) {
    rotary_write<float>(heads, cos, sin, nullptr, 0, cache, slots, rows, *of, threads);
}

// Returns 0, or 1 where there is no memory. `cache` is the layer's first element, of the kind that `out` is.
extern "C" int pando_attention(const float *query, int64_t q_stride, const void *cache, const Teams *teams,
                               const Shape *of, void *out, int64_t threads, int64_t half) {
    DO(return attention<T>(query, q_stride, (const T *)cache, *teams, *of, (T *)out, threads) ? 0 : 1)
}
