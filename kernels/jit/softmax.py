"""One tile's step of a running softmax over paged keys, and the merge of partial results: shared by both attentions.

Scores are in base 2: the scale, above zero, holds log2 e. Invariant: a masked position is not loaded, whatever it is.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(start, offsets, live, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """`[offsets, DIM]` from rows of HEAD_DIM elements; zero where not live and past HEAD_DIM."""
    dims = tl.arange(0, DIM)
    pointers = start + offsets[:, None] + dims[None, :]
    if HEAD_DIM != DIM:
        return tl.load(pointers, mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=live[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def accumulate(scores, scale, values, accumulator, total, largest, MASKED: tl.constexpr):
    """Take one tile's `scores[rows, tile]` (not scaled, -inf where not seen) and `values[tile, DIM]` into the state."""
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    shift = new_largest
    if MASKED:  # a row may have seen nothing yet
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    weights = tl.exp2(scores * scale - shift[:, None])
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weights, 1)
    accumulator = accumulator * fade[:, None]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="tf32x3")
    return accumulator, total, new_largest


@triton.jit
def finished(accumulator, total, largest):
    """The result of a softmax, zero for a row that saw nothing, and its state: log2 of the sum of exponentials."""
    result = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    state = tl.where(total == 0.0, -float("inf"), largest + tl.log2(tl.where(total == 0.0, 1.0, total)))
    return result, state


@triton.jit
def merged(
    parts,
    states,
    part_slots,
    count,
    head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    STEP: tl.constexpr,
):
    """`[ROWS, DIM]`: the softmax over all keys of a token's heads of one group, from `count` partial ones."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    live_row = rows < GROUP
    accumulator = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    for first in range(0, count, STEP):
        index = first + tl.arange(0, STEP)
        live = index < count
        slots = tl.load(part_slots + index, mask=live, other=0).to(tl.int64)
        at = slots[:, None] * NUM_HEADS + head * GROUP + rows[None, :]
        mask = live[:, None] & live_row[None, :]
        # Another program may have written these while this one ran: read past the cache of one processor.
        state = tl.load(states + at, mask=mask, other=-float("inf"), cache_modifier=".cg")
        mask = mask[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        part = tl.load(
            parts + at[:, :, None] * HEAD_DIM + dims[None, None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        new_largest = tl.maximum(largest, tl.max(state, 0))
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp2(state - shift[None, :])
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(weights, 0)
        accumulator = accumulator * fade[:, None] + tl.sum(part * weights[:, :, None], 0)
        largest = new_largest
    result, _ = finished(accumulator, total, largest)
    return result
