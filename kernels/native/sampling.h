// Drawing the token of each row of logits.
#pragma once
#include <cstdint>

// The most likely token of each of `logits[rows, vocab]`, rows `stride` floats apart: of equal ones the first. A logit
// that is NaN counts as -inf, 0.0 equals -0.0.
void argmax_rows(const float *logits, int64_t stride, int64_t rows, int64_t vocab, int64_t *tokens, int64_t threads);
