"""Attention of one query token over a range of its keys, for all ranges of all decoding sequences in one launch.

The last range of a token to finish merges all of them. Invariant: every counter is zero again when the launch ends.
"""

import triton
import triton.language as tl

from kernels.jit.softmax import accumulate, finished, load_rows, merged, nothing_seen, store_part, store_result
from kernels.jit.stored import head_addresses, load_kv


@triton.jit(do_not_specialize=["table_stride"])  # it changes from step to step: one build for all
def decode_kernel(
    out,  # [num_tokens, num_heads, head_dim]
    query,  # [num_tokens, num_heads, head_dim], rows query_stride apart
    sink_query,  # the same: scores the items that ask for it
    layer_kv,  # [num_blocks, 2, num_kv_heads, block_size, head_dim], blocks block_stride apart
    scales,  # [num_blocks, 2, num_kv_heads, block_size], blocks half of block_stride apart; as KIND has them
    tables,  # [num_seqs, max_blocks] int32, rows table_stride apart
    items,  # [num_items, 8] int32
    part_slots,  # int32: which parts belong to a token
    parts,  # [num_slots, num_heads, head_dim] float32
    states,  # [num_slots, num_heads] float32
    counters,  # [num_tokens, num_kv_heads] int32, zero
    scale,
    query_stride,
    sink_stride,
    block_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEAD_ROW: tl.constexpr,  # from one head to the next within a block
    KIND: tl.constexpr,
):
    head = tl.program_id(0)
    item = items + tl.program_id(1) * 8
    token = tl.load(item).to(tl.int64)
    table = tables + tl.load(item + 1).to(tl.int64) * table_stride
    start, end = tl.load(item + 2), tl.load(item + 3)
    slot, for_sinks = tl.load(item + 4).to(tl.int64), tl.load(item + 5)
    first_part, num_parts = tl.load(item + 6), tl.load(item + 7)

    rows = tl.arange(0, ROWS)
    row_heads = head * GROUP + rows
    live_row = rows < tl.where(slot >= 0, GROUP, 0)  # without a slot the item fills up a list
    if HAS_SINKS:
        near, far = rows < GROUP * (1 - for_sinks), rows < GROUP * for_sinks
        rows_of = load_rows(query + token * query_stride, row_heads * HEAD_DIM, near, HEAD_DIM, DIM, True)
        rows_of += load_rows(sink_query + token * sink_stride, row_heads * HEAD_DIM, far, HEAD_DIM, DIM, True)
    else:
        rows_of = load_rows(query + token * query_stride, row_heads * HEAD_DIM, live_row, HEAD_DIM, DIM, True)

    MATH: tl.constexpr = tl.float16 if KIND == "fp8" and rows_of.dtype == tl.bfloat16 else rows_of.dtype
    keys_of, key_scales_of, values_of, value_scales_of = head_addresses(layer_kv, scales, head, NUM_KV_HEADS, HEAD_ROW)
    result, state = attend(
        rows_of.to(MATH), keys_of, values_of, key_scales_of, value_scales_of, table, block_stride, scale, start, end,
        ROWS, HEAD_DIM, DIM, BLOCK_SIZE, TILE, KIND,
    )  # fmt: skip

    if num_parts == 1:
        store_result(out, token, row_heads, live_row, result, NUM_KV_HEADS * GROUP, HEAD_DIM)
    else:
        store_part(parts, states, slot, row_heads, live_row, result, state, NUM_KV_HEADS * GROUP, HEAD_DIM)
        if num_parts > 1:
            merge_if_last(
                out, part_slots + first_part, parts, states, counters, token, num_parts, head,
                NUM_KV_HEADS, GROUP, MERGE_ROWS, MERGE_STEP, HEAD_DIM, DIM,
            )  # fmt: skip


@triton.jit
def attend(
    rows_of,
    keys_of,
    values_of,
    key_scales_of,
    value_scales_of,
    table,
    block_stride,
    scale,
    start,
    end,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
):
    """The softmax of `rows_of[ROWS, DIM]` over positions [start, end), which all of them see, and its state."""
    accumulator, total, largest = nothing_seen(ROWS, DIM)
    # Block numbers are loaded one step ahead, so that copies of keys and values may run several steps ahead.
    ahead = start + tl.arange(0, TILE)
    blocks_ahead = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
    for position in range(start, end, TILE):
        positions, blocks = position + tl.arange(0, TILE), blocks_ahead
        live = positions < end
        blocks_ahead = tl.load(table + (positions + TILE) // BLOCK_SIZE, mask=positions + TILE < end, other=0)
        keys, key_scales = load_kv(
            keys_of, key_scales_of, blocks, positions, live, block_stride,
            HEAD_DIM, DIM, BLOCK_SIZE, True, KIND, rows_of.dtype,
        )  # fmt: skip
        values, value_scales = load_kv(
            values_of, value_scales_of, blocks, positions, live, block_stride,
            HEAD_DIM, DIM, BLOCK_SIZE, True, KIND, rows_of.dtype,
        )  # fmt: skip
        scores = tl.dot(rows_of, tl.trans(keys), input_precision="tf32x3")
        if KIND != "same":
            scores *= key_scales[None, :]
        scores = tl.where(live[None, :], scores, -float("inf"))
        accumulator, total, largest = accumulate(
            scores, scale, values, value_scales, accumulator, total, largest, False, KIND != "same"
        )
    return finished(accumulator, total, largest)


@triton.jit
def merge_if_last(
    out,
    part_slots,
    parts,
    states,
    counters,
    token,
    num_parts,
    head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Count this part in; the last one of its token and group merges them all and sets the counter back."""
    tl.debug_barrier()  # all of this program's stores come before its count
    counter = counters + token * NUM_KV_HEADS + head
    if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
        num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
        result = merged(parts, states, part_slots, num_parts, head, num_heads, GROUP, ROWS, HEAD_DIM, DIM, STEP)
        rows = tl.arange(0, ROWS)
        store_result(out, token, head * GROUP + rows, rows < GROUP, result, num_heads, HEAD_DIM)
        tl.store(counter, 0)


@triton.jit
def merge_kernel(
    out,
    part_slots,
    parts,
    states,
    merges,  # [num_merges, 3] int32: token, where its part slots begin, how many
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Merge the parts of tokens whose decode items leave it to this launch, or that have none."""
    head = tl.program_id(0)
    merge = merges + tl.program_id(1) * 3
    token = tl.load(merge).to(tl.int64)
    slots, num_parts = part_slots + tl.load(merge + 1), tl.load(merge + 2)
    num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    result = merged(parts, states, slots, num_parts, head, num_heads, GROUP, ROWS, HEAD_DIM, DIM, STEP)
    rows = tl.arange(0, ROWS)
    store_result(out, token, head * GROUP + rows, rows < tl.where(num_parts > 0, GROUP, 0), result, num_heads, HEAD_DIM)
