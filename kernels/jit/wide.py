"""Attention of many query rows over one range of keys: a tile of a prompt's chunk, or all queries that share a prefix.

A row is one head of one token; the rows of a group of heads lie together. Invariant: which keys a row sees follows
from its token's position and the item's two distances alone.
"""

import triton
import triton.language as tl

from kernels.jit.softmax import accumulate, finished, load_rows, nothing_seen, store_part, store_result
from kernels.jit.stored import head_addresses, load_kv


@triton.jit
def attend(
    rows_of,
    row_positions,
    keys_of,
    values_of,
    key_scales_of,
    value_scales_of,
    table,
    block_stride,
    scale,
    accumulator,
    total,
    largest,
    start,
    end,
    far,
    near,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Take positions [start, end) into the state; a row sees those from `far` to `near` positions before its own. With
    FIXED tiles begin at multiples of their size."""
    lowest = start
    if FIXED:
        start = start // TILE * TILE
    for position in range(start, end, TILE):
        positions = position + tl.arange(0, TILE)
        live = positions < end
        if FIXED:
            live = live & (positions >= lowest)
        if MASKED:
            blocks = tl.load(table + positions // BLOCK_SIZE, mask=live, other=0)
        else:
            blocks = tl.load(table + positions // BLOCK_SIZE)
        keys, key_scales = load_kv(
            keys_of, key_scales_of, blocks, positions, live, block_stride,
            HEAD_DIM, DIM, BLOCK_SIZE, MASKED, KIND, rows_of.dtype,
        )  # fmt: skip
        scores = tl.dot(rows_of, tl.trans(keys), input_precision="tf32x3")
        values, value_scales = load_kv(
            values_of, value_scales_of, blocks, positions, live, block_stride,
            HEAD_DIM, DIM, BLOCK_SIZE, MASKED, KIND, rows_of.dtype,
        )  # fmt: skip
        if KIND != "same":
            scores *= key_scales[None, :]
        if MASKED:
            distance = row_positions[:, None] - positions[None, :]
            seen = (distance >= near) & (distance <= far) & live[None, :]
            scores = tl.where(seen, scores, -float("inf"))
        accumulator, total, largest = accumulate(
            scores, scale, values, value_scales, accumulator, total, largest, MASKED, KIND != "same"
        )
    return accumulator, total, largest


@triton.jit(do_not_specialize=["table_stride"])  # it changes from step to step: one build for all
def wide_kernel(
    out,  # [num_tokens, num_heads, head_dim]
    query,  # [num_tokens, num_heads, head_dim], rows query_stride apart
    sink_query,  # the same: scores the items that ask for it
    layer_kv,  # [num_blocks, 2, num_kv_heads, block_size, head_dim], blocks block_stride apart
    scales,  # [num_blocks, 2, num_kv_heads, block_size], blocks half of block_stride apart; as KIND has them
    tables,  # [num_seqs, max_blocks] int32, rows table_stride apart
    items,  # [num_items, 12] int32
    tokens,  # int32: the tokens of each item, one after the other
    positions,  # [num_tokens] int32
    parts,  # [num_slots, num_heads, head_dim] float32
    states,  # [num_slots, num_heads] float32
    scale,
    query_stride,
    sink_stride,
    block_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEAD_ROW: tl.constexpr,  # from one head to the next within a block
    KIND: tl.constexpr,
    FIXED: tl.constexpr,  # all keys are masked ones, so that each row takes the same steps in any tile
):
    head = tl.program_id(0)
    item = items + tl.program_id(1) * 12
    first, count = tl.load(item), tl.load(item + 1)
    table = tables + tl.load(item + 2).to(tl.int64) * table_stride
    start, full_end, end = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    slot, far, near = tl.load(item + 6).to(tl.int64), tl.load(item + 7), tl.load(item + 8)

    index = tl.arange(0, ROWS) // GROUP
    row_heads = head * GROUP + tl.arange(0, ROWS) % GROUP
    live_row = index < count
    token = tl.load(tokens + first + index, mask=live_row, other=0).to(tl.int64)
    row_positions = tl.load(positions + token, mask=live_row, other=0)
    query_rows = token * query_stride + row_heads * HEAD_DIM
    if HAS_SINKS:
        for_sinks = tl.load(item + 9)
        rows_of = load_rows(query, query_rows, index < count * (1 - for_sinks), HEAD_DIM, DIM, True)
        sink_rows = token * sink_stride + row_heads * HEAD_DIM
        rows_of += load_rows(sink_query, sink_rows, index < count * for_sinks, HEAD_DIM, DIM, True)
    else:
        rows_of = load_rows(query, query_rows, live_row, HEAD_DIM, DIM, True)

    MATH: tl.constexpr = tl.float16 if KIND == "fp8" and rows_of.dtype == tl.bfloat16 else rows_of.dtype
    rows_of = rows_of.to(MATH)
    keys_of, key_scales_of, values_of, value_scales_of = head_addresses(layer_kv, scales, head, NUM_KV_HEADS, HEAD_ROW)
    accumulator, total, largest = nothing_seen(ROWS, DIM)
    if not FIXED:
        accumulator, total, largest = attend(
            rows_of, row_positions, keys_of, values_of, key_scales_of, value_scales_of, table, block_stride, scale,
            accumulator, total, largest, start, full_end, far, near,
            HEAD_DIM, DIM, BLOCK_SIZE, TILE, False, KIND, False,
        )  # fmt: skip
    accumulator, total, largest = attend(
        rows_of, row_positions, keys_of, values_of, key_scales_of, value_scales_of, table, block_stride, scale,
        accumulator, total, largest, full_end, end, far, near, HEAD_DIM, DIM, BLOCK_SIZE, TILE, True, KIND, FIXED,
    )  # fmt: skip
    result, state = finished(accumulator, total, largest)
    if slot < 0:
        store_result(out, token, row_heads, live_row, result, NUM_KV_HEADS * GROUP, HEAD_DIM)
    else:
        store_part(parts, states, slot + index, row_heads, live_row, result, state, NUM_KV_HEADS * GROUP, HEAD_DIM)
