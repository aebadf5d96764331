#include "layers.h"

#include <cstdlib>

// What lies between the layers' operations, of one step.
template <class T>
struct Between {
    float *residual, *cos, *sin, *heads, *last_heads, *last_residual;
    T *normed, *mixed, *gated;
};

INLINE int64_t head_width(const Shape &of) { return (of.num_heads + 2 * of.num_kv_heads) * of.head_dim; }

// Rows `last` of `from[rows, width]`, `count` first numbers of each.
INLINE void gather(const float *from, int64_t width, const int64_t *last, int64_t num_last, int64_t count, float *into) {
    for (int64_t row = 0; row < num_last; row++)
        memcpy(into + row * count, from + last[row] * width, count * sizeof(float));
}

template <class T>
static bool run(const Stack &stack, const Tokens &tokens, T *const *caches, const Between<T> &by, T *out,
                int64_t threads) {
    Shape shape = stack.shape;
    const int64_t hidden = stack.hidden_size, width = head_width(shape), queries = shape.num_heads * shape.head_dim;
    const int64_t words = hidden / PER_WORD<T>;
    float *residual = by.residual, *heads = by.heads;
    int64_t rows = tokens.rows, q_stride = width;
    const Teams *teams = &tokens.teams;
    Watch watch{tokens.spent};
    embed<T>((const T *)stack.embedding, tokens.token_ids, residual, rows, hidden, threads);
    angles<T>(stack.frequencies, tokens.positions, by.cos, by.sin, rows, shape.head_dim, threads);
    for (int64_t index = 0; index < stack.num_layers; index++) {
        const Layer &layer = stack.layers[index];
        shape.window = layer.window;
        norm<T>(nullptr, residual, layer.attention_norm, by.normed, rows, hidden, stack.norm_eps, threads);
        watch.was(REST);
        linear<T>((const float *)by.normed, words, layer.qkv, heads, rows, threads);
        watch.was(PRODUCT);
        rotary_write<T>(heads, by.cos, by.sin, layer.qk_norm, stack.norm_eps, caches[index], tokens.slots, rows,
                        shape, threads);
        if (tokens.last && index == stack.num_layers - 1) {
            if (!tokens.num_last) return true;
            gather(residual, hidden, tokens.last, tokens.num_last, hidden, by.last_residual);
            gather(heads, width, tokens.last, tokens.num_last, queries, by.last_heads);
            residual = by.last_residual, heads = by.last_heads, q_stride = queries;
            rows = tokens.num_last, teams = &tokens.last_teams;
        }
        watch.was(REST);
        if (!attention<T>(heads, q_stride, caches[index], *teams, shape, by.mixed, threads)) return false;
        watch.was(ATTENTION);
        add_linear<T>((const float *)by.mixed, queries / PER_WORD<T>, layer.output, residual, rows, threads);
        watch.was(PRODUCT);
        norm<T>(nullptr, residual, layer.mlp_norm, by.normed, rows, hidden, stack.norm_eps, threads);
        watch.was(REST);
        gated_linear<T>((const float *)by.normed, words, layer.gate_up, by.gated, rows, threads);
        add_linear<T>((const float *)by.gated, stack.intermediate_size / PER_WORD<T>, layer.down, residual, rows,
                      threads);
        watch.was(PRODUCT);
    }
    norm<T>(nullptr, residual, stack.norm, out, rows, hidden, stack.norm_eps, threads);
    watch.was(REST);
    return true;
}

template <class T>
INLINE T *part(char **rest, int64_t count) {
    T *here = (T *)*rest;
    *rest += (count * sizeof(T) + 63) / 64 * 64;
    return here;
}

template <class T>
static Verdict layers(const Stack &stack, const Tokens &tokens, T *const *caches, T *out, int64_t threads) {
    const Shape &shape = stack.shape;
    const int64_t rows = tokens.rows, last = tokens.last ? tokens.num_last : 0, width = head_width(shape);
    const int64_t numbers = rows * (2 * width + 2 * stack.hidden_size + 2 * shape.head_dim + stack.intermediate_size) +
                            last * (width + stack.hidden_size) + 9 * 16;
    char *memory = (char *)aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64), *rest = memory;
    if (!memory) return NO_MEMORY;
    Between<T> by;
    by.residual = part<float>(&rest, rows * stack.hidden_size);
    by.cos = part<float>(&rest, rows * shape.head_dim);
    by.sin = part<float>(&rest, rows * shape.head_dim);
    by.heads = part<float>(&rest, rows * width);
    by.last_heads = part<float>(&rest, last * width);
    by.last_residual = part<float>(&rest, last * stack.hidden_size);
    by.normed = part<T>(&rest, rows * stack.hidden_size);
    by.mixed = part<T>(&rest, rows * width);
    by.gated = part<T>(&rest, rows * stack.intermediate_size);
    const bool done = run<T>(stack, tokens, caches, by, out, threads);
    free(memory);
    return done ? GOOD : NO_MEMORY;
}

Verdict run_layers(const Stack &stack, const Tokens &tokens, void *const *caches, void *out, int64_t threads, bool half) {
    for (int64_t row = 0; row < tokens.rows; row++)
        if (tokens.token_ids[row] < 0 || tokens.token_ids[row] >= stack.vocab_size) return UNKNOWN_TOKEN;
#if HAS_BF16
    if (half) return layers<bf16>(stack, tokens, (bf16 *const *)caches, (bf16 *)out, threads);
#endif
    return layers<float>(stack, tokens, (float *const *)caches, (float *)out, threads);
}

extern "C" int64_t pando_layers(const Stack *stack, const Tokens *tokens, void *const *caches, void *out,
                                int64_t threads, int64_t half) {
    return run_layers(*stack, *tokens, caches, out, threads, half);
}
