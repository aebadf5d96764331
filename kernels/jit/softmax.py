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
def nothing_seen(ROWS: tl.constexpr, DIM: tl.constexpr):
    """The state before the first tile: accumulator, total, largest."""
    return tl.zeros([ROWS, DIM], tl.float32), tl.zeros([ROWS], tl.float32), tl.full([ROWS], -float("inf"), tl.float32)


@triton.jit
def accumulate(
    scores, scale, values, value_scales, accumulator, total, largest, MASKED: tl.constexpr, SCALED: tl.constexpr
):
    """Take one tile's `scores[rows, tile]` (not scaled, -inf where not seen) and `values[tile, DIM]`, with SCALED each
    times its `value_scales[tile]`, into the state."""
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    shift = new_largest
    if MASKED:  # a row may have seen nothing yet
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    weights = tl.exp2(scores * scale - shift[:, None])
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weights, 1)
    accumulator = accumulator * fade[:, None]
    if SCALED:
        if values.dtype == tl.float16:
            # Small scales would leave its range: within a tile they count by the largest.
            most = tl.max(value_scales, 0)
            weights *= (value_scales / tl.where(most == 0.0, 1.0, most))[None, :]
            return accumulator + most * tl.dot(weights.to(values.dtype), values), total, new_largest
        weights *= value_scales[None, :]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="tf32x3")
    return accumulator, total, new_largest


@triton.jit
def finished(accumulator, total, largest):
    """The result of a softmax, zero for a row that saw nothing, and its state: log2 of the sum of exponentials."""
    result = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    state = tl.where(total == 0.0, -float("inf"), largest + tl.log2(tl.where(total == 0.0, 1.0, total)))
    return result, state


@triton.jit
def store_result(out, token, row_heads, live_row, result, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """`result[rows, DIM]` of heads of one token, or each row its own, into `out[num_tokens, NUM_HEADS, HEAD_DIM]`."""
    dims = tl.arange(0, result.shape[1])
    at = (token * NUM_HEADS + row_heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=live_row[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def store_part(
    parts, states, slot, row_heads, live_row, result, state, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The same for a result that is not complete, with its state `[rows]`: into a part slot, or one for each row."""
    store_result(parts, slot, row_heads, live_row, result, NUM_HEADS, HEAD_DIM)
    tl.store(states + slot * NUM_HEADS + row_heads, state, mask=live_row)


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
