// A decoder but for its head, in one team of threads: from token ids to the norm behind the last layer.
#pragma once
#include <chrono>

#include "plan.h"

struct Layer {
    const float *attention_norm;
    Packed qkv;
    const float *qk_norm;  // [num_heads + num_kv_heads, head_dim] or null
    Packed output;
    const float *mlp_norm;
    Packed gate_up, down;
    int64_t window;
};

struct Stack {
    const void *embedding;  // [vocab_size, hidden_size]
    int64_t vocab_size;
    Frequencies frequencies;
    const Layer *layers;
    int64_t num_layers;
    const float *norm;
    Packed head;  // without panels where there is none
    int64_t hidden_size, intermediate_size;
    float norm_eps;
    Shape shape;
};

// A step's tokens. `last[num_last]` are the rows whose results are wanted, attended as `last_teams` says, whose rows
// count in `last`; null: all of them.
struct Tokens {
    int64_t rows;
    const int64_t *token_ids, *positions, *slots;
    Teams teams;
    const int64_t *last;
    int64_t num_last;
    Teams last_teams;
    int64_t *spent;  // null, or nanoseconds that are added to, one for each `Kind`
};

enum Kind { PRODUCT, ATTENTION, REST, HEAD, SAMPLING, PLANNING };

// Adds up what the caller's time went to, where somebody wants to know.
struct Watch {
    typedef std::chrono::steady_clock Clock;
    int64_t *spent;
    Clock::time_point last = spent ? Clock::now() : Clock::time_point();

    // All since the last call was of this kind.
    void was(Kind kind) {
        if (!spent) return;
        const Clock::time_point now = Clock::now();
        spent[kind] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last).count();
        last = now;
    }
};

// `caches` are the layers' first elements; `out[rows or num_last, hidden_size]`. `half`: of bf16.
Verdict run_layers(const Stack &stack, const Tokens &tokens, void *const *caches, void *out, int64_t threads, bool half);

