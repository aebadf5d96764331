// Whose queries of a step go through the cache together.
#pragma once
#include "ops.h"

// What becomes of a step.
enum Verdict : int64_t { GOOD, NO_MEMORY, BAD_LENGTHS, SHORT_TABLE, HOLE_READ, HOLE_WRITTEN, UNKNOWN_TOKEN };

// A step to be planned. A window of 0 is none.
struct Order {
    const int64_t *query_lens, *context_lens;  // [num_seqs]
    const int64_t *tables;  // [num_seqs, stride]
    int64_t num_seqs, num_tokens, stride, block_size;
    const int64_t *windows;
    int64_t num_windows;
    int64_t most_tokens, most_sequences;  // of a piece, of a team
    int64_t num_kv_heads, threads;
};

// Where its plan goes: `members` has room for `num_seqs + num_tokens / most_tokens`, `teams` for one more.
struct Answer {
    int64_t *slots;  // [num_tokens]
    int32_t *tables;  // [num_seqs, stride]
    Member *members;
    int64_t *teams;
    int64_t num_teams, most_rows;
};

// How many members a step may have.
inline int64_t most_members(const Order &order) {
    return order.num_seqs + order.num_tokens / order.most_tokens;
}

Verdict plan(const Order &order, Answer &answer);
