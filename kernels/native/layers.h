// A decoder but for its head, in one team of threads: from token ids to the norm behind the last layer.
#pragma once
#include "ops.h"

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
    int64_t *spent;  // null, or nanoseconds that are added to: products, attention, the rest
};
