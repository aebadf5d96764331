// Operations that up to `threads` threads share out among themselves. T is `float` or `bf16`.
#pragma once
#include "team.h"
#include "tile.h"

// A weight in panels, `[columns / PANEL][depth][PANEL]` words, padded with zeros past `columns`.
struct Packed {
    const float *panels;
    const float *bias;  // [columns] or null
    int64_t columns, depth;  // depth in words
};

// How a step's heads lie, and the cache they are written to and read from.
struct Shape {
    int64_t num_heads, num_kv_heads, head_dim, block_size, block_stride, window;
    float scale;
};

// Some tokens of one sequence: their rows among the step's tokens, and the position of the first.
struct Member {
    int64_t sequence, first_row, rows, position;
};

// Whose queries a step has: team i is members [teams[i], teams[i + 1]), of at most `most_rows` tokens together.
struct Teams {
    const int32_t *tables;  // [num_seqs, table_stride]
    const Member *members;
    const int64_t *teams;
    int64_t num_teams, most_rows, table_stride;
    int64_t *taken;  // null, or positions of one head read from the cache are added to it
};

// Radians per position of each pair of a head; angles are computed in double precision where they are `exact`.
struct Frequencies {
    const double *of;  // [head_dim / 2]
    int64_t exact;
};

// `out[row] = table[ids[row]]`, and cosine and signed sine of positions as `rotary_write` takes them.
template <class T>
void embed(const T *table, const int64_t *ids, float *out, int64_t rows, int64_t width, int64_t threads);
template <class T>
void angles(const Frequencies &frequencies, const int64_t *positions, float *cos, float *sin, int64_t rows, int64_t dim,
            int64_t threads);

// `out = x @ weight + bias`, and `out += x @ weight + bias`; `x[rows, depth]` in words.
template <class T>
void linear(const float *x, int64_t x_stride, const Packed &weight, float *out, int64_t rows, int64_t threads);
template <class T>
void add_linear(const float *x, int64_t x_stride, const Packed &weight, float *out, int64_t rows, int64_t threads);

// `silu(gate) * up` of a weight whose panels have LANES columns of gate, then the same of up: `out[rows, columns / 2]`.
// Its bias has all gates first.
template <class T>
void gated_linear(const float *x, int64_t x_stride, const Packed &weight, T *out, int64_t rows, int64_t threads);

// `out = norm(residual) * weight`, after `residual += x` where there is an x. All [rows, width].
template <class T>
void norm(const float *x, float *residual, const float *weight, T *out, int64_t rows, int64_t width, float eps,
          int64_t threads);

// Norm each head of queries and keys by its row of `norms` where there are any, rotate them, and bring keys and values
// to their slots: `heads[rows, num_heads + 2 * num_kv_heads, dim]`; the queries stay in it. `cos` and `sin` are
// [rows, 2, dim / 2], the sine signed; `slots[rows]` counts positions of the pool.
template <class T>
void rotary_write(float *heads, const float *cos, const float *sin, const float *norms, float eps, T *cache,
                  const int64_t *slots, int64_t rows, const Shape &of, int64_t threads);

// Causal attention of `query` (rows of `q_stride` floats) to `out[rows, num_heads, dim]`; false: there is no memory.
template <class T>
bool attention(const float *query, int64_t q_stride, const T *cache, const Teams &teams, const Shape &of, T *out,
               int64_t threads);
