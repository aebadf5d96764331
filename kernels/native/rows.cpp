// What is done to each token alone: norms, rotation and the write to the cache, the gate.
#include <cmath>

#include "tile.h"

static const int64_t ALONE = 32;  // tokens that one thread does sooner than several

// `out = norm(residual) * weight`, after `residual += x` where there is an x. All [rows, width].
extern "C" void pando_norm(const float *x, float *residual, const float *weight, float *out, int64_t rows,
                           int64_t width, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        float *here = residual + row * width;
        vec squares{};
        float rest = 0;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) {
            vec value = load(here + c);
            if (x) store(here + c, value = value + load(x + row * width + c));
            squares = value * value + squares;
        }
        for (; c < width; c++) {
            if (x) here[c] += x[row * width + c];
            rest += here[c] * here[c];
        }
        const float by = 1 / sqrtf((lanes_sum(squares) + rest) / (float)width + eps);
        for (c = 0; c + LANES <= width; c += LANES)
            store(out + row * width + c, load(here + c) * by * load(weight + c));
        for (; c < width; c++) out[row * width + c] = here[c] * by * weight[c];
    }
}

// `silu(gate) * up` of `gate_up[rows, 2 * width]`.
extern "C" void pando_silu_mul(const float *gate_up, float *out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + 2 * row * width, *up = gate + width;
        float *into = out + row * width;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) {
            const vec value = load(gate + c);
            store(into + c, value / (exponential(-value) + 1.0f) * load(up + c));
        }
        for (; c < width; c++) into[c] = gate[c] / (expf(-gate[c]) + 1) * up[c];
    }
}

// Rotate queries in place, keys and values go to their slots: `heads[rows, num_heads + 2 * num_kv_heads, dim]`.
// `cos` and `sin` are [rows, 2, dim / 2], the sine signed; `slots[rows]` counts positions of the pool.
extern "C" void pando_rotary_write(float *heads, const float *cos, const float *sin, float *cache,
                                   const int64_t *slots, int64_t rows, const int64_t *shape, int64_t threads) {
    const int64_t num_heads = shape[0], num_kv_heads = shape[1], dim = shape[2], block_size = shape[3];
    const int64_t block_stride = shape[4], half = dim / 2;
#pragma omp parallel for num_threads(threads) if (rows > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        const float *c = cos + row * dim, *s = sin + row * dim;
        float *slot = cache + slots[row] / block_size * block_stride + slots[row] % block_size * dim;
        for (int64_t head = 0; head < num_heads + 2 * num_kv_heads; head++) {
            float *from = heads + (row * (num_heads + 2 * num_kv_heads) + head) * dim;
            float *into = head < num_heads ? from : slot + (head - num_heads) * block_size * dim;
            if (head >= num_heads + num_kv_heads) {
                memcpy(into, from, dim * sizeof(float));
                continue;
            }
            for (int64_t d = 0; d < half; d++) {
                const float a = from[d], b = from[half + d];
                into[d] = a * c[d] + b * s[d];
                into[half + d] = b * c[half + d] + a * s[half + d];
            }
        }
    }
}
