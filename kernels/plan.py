"""The host's work list for one step of attention: planned once from lengths and block tables, used by every layer.

Knows lengths and block numbers only. Invariant: a plan names no cache position past a sequence's context, and none
between its sinks and its window, except ones it also lists as dead; dead positions are cleared after the gather.

A layer's cache is addressed as rows: a *head row* is one head's tokens of a block, `[block_size * head_dim]`, a
*slot row* is one head's vector of a slot, `[head_dim]`. Row numbers count from the layer's first element, so one plan
serves all layers. With `heads = num_layers * 2 * num_kv_heads` head rows in a block:

    head row = block * heads + kv * num_kv_heads + head        slot row = head row * block_size + offset
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.quantize import KV
from kernels.step import Ints, Range, Step, checked_step

# Bounds of one gather, in elements. Gathered KV should stay in the processor's cache until it is used; below the
# small bound an operation's fixed cost outweighs any padding.
LARGEST_GATHER = 1 << 19
SMALL_GATHER = 1 << 16
TILE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Gather:
    """KV of some contexts as one dense `[2, num_rows, num_kv_heads, length, head_dim]`."""

    num_rows: int
    length: int  # positions, a multiple of block_size
    head_rows: torch.Tensor  # [2 * num_rows * num_kv_heads * length / block_size] int64
    dead: torch.Tensor  # [num_dead] int64: rows of the gathered [2 * num_rows * num_kv_heads * length, head_dim]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of about one length that compute one token each."""

    tokens: slice | torch.Tensor  # which of num_tokens
    gather: Gather
    mask: torch.Tensor  # [num_rows, 1, 1, length], 0 or -inf


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Consecutive queries of one sequence and the gathered positions they can see."""

    tokens: slice
    keys: slice
    mask: torch.Tensor  # [tokens, keys], 0 or -inf


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One sequence that computes several tokens."""

    gather: Gather
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True, slots=True)
class WindowWork:
    """All attention of a step for layers with one window."""

    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]

    @property
    def largest_gather(self) -> int:
        """In head rows."""
        gathers = [group.gather for group in self.decode] + [chunk.gather for chunk in self.prefill]
        return max((gather.head_rows.numel() for gather in gathers), default=0)


@dataclass(frozen=True, slots=True)
class SinkWork:
    """Sequences longer than a window with sinks: what their queries see in the window, and of the sinks before it."""

    window: WindowWork
    sinks: WindowWork


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What `write_kv` and `attention` do in every layer of a step."""

    num_tokens: int
    slot_rows: torch.Tensor  # [num_tokens * 2 * num_kv_heads] int64: where each head's key and value are written
    work: dict[int | None, WindowWork]  # by window; None sees the whole context
    sink_work: dict[int, SinkWork]  # by window, where some sequence is longer than it; not in `work` then
    workspace: torch.Tensor  # room for the largest gather: a fresh buffer in each layer would cost its page faults


def plan_attention(
    kv_cache: KV,
    query_lens: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    block_tables: Ints,
    *,
    num_heads: int,
    windows: Sequence[int | None] = (None,),
    sinks: Mapping[int, int] | None = None,
) -> AttentionPlan:
    """As `kernels.plan_attention`; blocks that sequences share are gathered for each."""
    step = checked_step(kv_cache, query_lens, context_lens, block_tables)
    rows = step.tensor(slot_rows(step))
    work, sink_work = _work(step, windows, sinks or {})
    parts = [part for of in sink_work.values() for part in (of.window, of.sinks)]
    most = max(of.largest_gather for of in (*work.values(), *parts))
    workspace = torch.empty(most * step.block_size * step.head_dim, dtype=step.dtype, device=step.device)
    return AttentionPlan(step.num_tokens, rows, work, sink_work, workspace)


def _work(
    step: Step, windows: Sequence[int | None], sinks: Mapping[int, int]
) -> tuple[dict[int | None, WindowWork], dict[int, SinkWork]]:
    work: dict[int | None, WindowWork] = {}
    sink_work: dict[int, SinkWork] = {}
    every = np.arange(len(step.query_lens))
    for window in dict.fromkeys(windows):
        count = 0 if window is None else sinks.get(window, 0)
        longer = step.context_lens > window if window is not None and count else np.zeros(len(every), dtype=np.bool_)
        work[window] = _window_work(step, every[~longer], window)
        if window is not None and longer.any():
            sink_work[window] = SinkWork(
                _window_work(step, every[longer], window), _sinks_work(step, every[longer], window, count)
            )
    return work, sink_work


def slot_rows(step: Step) -> Ints:
    """Where each head's key and value are written: [num_tokens * 2 * num_kv_heads]."""
    slots = step.slots()
    head_row = (slots // step.block_size * step.heads)[:, None] + step.kv_rows.reshape(1, -1)
    rows: Ints = head_row * step.block_size + (slots % step.block_size)[:, None]
    return rows.reshape(-1)


def _window_work(step: Step, members: Ints, window: int | None) -> WindowWork:
    """The windows of these sequences."""
    seen = step.seen(window)
    chunks = members[step.query_lens[members] > 1]
    return WindowWork(
        decode=_decode_groups(step, members, seen),
        prefill=tuple(_prefill_chunk(step, int(member), seen, window) for member in chunks),
    )


def _sinks_work(step: Step, members: Ints, window: int, sinks: int) -> WindowWork:
    """The sinks of these sequences, all longer than the window, as far as they are before it."""
    seen = step.seen_sinks(window, sinks)
    chunks = members[step.query_lens[members] > 1]
    return WindowWork(
        decode=_decode_groups(step, members, seen),
        prefill=tuple(_sink_chunk(step, int(member), seen, window) for member in chunks),
    )


def _decode_groups(step: Step, members: Ints, seen: Range) -> tuple[DecodeGroup, ...]:
    members = members[step.query_lens[members] == 1]
    buckets = _buckets(step, members, seen.blocks(step.block_size))
    return tuple(_decode_group(step, bucket, seen) for bucket in buckets)


def _buckets(step: Step, members: Ints, blocks: Ints) -> list[Ints]:
    """Split decoding sequences so that each group pads little and gathers no more than fits the cache."""
    if not len(members):
        return []
    members = members[np.argsort(-blocks[members], kind="stable")]
    unit = 2 * step.num_kv_heads * step.block_size * step.head_dim
    groups: list[Ints] = []
    begin, widest = 0, int(blocks[members[0]])
    for index, count in enumerate(blocks[members].tolist()):
        elements = (index - begin + 1) * widest * unit
        fits = elements <= SMALL_GATHER or (elements <= LARGEST_GATHER and 4 * count >= 3 * widest)
        if index > begin and not fits:
            groups.append(np.sort(members[begin:index]))
            begin, widest = index, count
    groups.append(np.sort(members[begin:]))
    return groups


def _decode_group(step: Step, members: Ints, seen: Range) -> DecodeGroup:
    gather, live = _gather(step, members, seen)
    tokens = step.query_starts[members]
    contiguous = int(tokens[-1] - tokens[0]) == len(tokens) - 1
    return DecodeGroup(
        tokens=slice(int(tokens[0]), int(tokens[-1]) + 1) if contiguous else step.tensor(tokens),
        gather=gather,
        mask=_additive(step, live)[:, None, None, :],
    )


def _prefill_chunk(step: Step, member: int, seen: Range, window: int | None) -> PrefillChunk:
    gather, _ = _gather(step, np.array([member]), seen)
    count = int(step.query_lens[member])
    start = int(step.context_lens[member]) - count
    base = int(seen.first[member]) // step.block_size * step.block_size
    first_token = int(step.query_starts[member])
    tiles = []
    for row in range(0, count, TILE_ROWS):
        rows = min(TILE_ROWS, count - row)
        # Gathered positions: the tile's first query is at `end - rows`, and with a window sees from `begin` on.
        end = start + row + rows - base
        begin = 0 if window is None else end - rows - (window - 1)
        keys = slice(max(begin, 0), end)
        tokens = slice(first_token + row, first_token + row + rows)
        tiles.append(PrefillTile(tokens, keys, _causal_mask(step, rows, keys, None if window is None else begin)))
    return PrefillChunk(gather, tuple(tiles))


def _sink_chunk(step: Step, member: int, seen: Range, window: int) -> PrefillChunk:
    """The queries that are past the window, and the sinks that are before theirs."""
    gather, _ = _gather(step, np.array([member]), seen)
    start = int(step.context_lens[member] - step.query_lens[member])
    first, end = max(start, window), int(step.context_lens[member])
    keys = slice(0, int(seen.end[member]))
    tiles = []
    for position in range(first, end, TILE_ROWS):
        positions = np.arange(position, min(position + TILE_ROWS, end))
        token = int(step.query_starts[member]) + position - start
        before = np.arange(keys.stop)[None, :] <= positions[:, None] - window
        tiles.append(PrefillTile(slice(token, token + len(positions)), keys, _additive(step, before)))
    return PrefillChunk(gather, tuple(tiles))


def _causal_mask(step: Step, rows: int, keys: slice, begin: int | None) -> torch.Tensor:
    """[rows, keys]: the last `rows` of `keys` are the queries' own; the first query sees from `begin` on, each
    further one from one later."""
    width = keys.stop - keys.start
    hidden = torch.full((rows, width), -torch.inf, dtype=step.dtype, device=step.device)
    if begin is None:
        return hidden.triu_(width - rows + 1)
    return hidden.triu(width - rows + 1).add_(hidden.tril_(begin - keys.start - 1))


def _gather(step: Step, members: Ints, seen: Range) -> tuple[Gather, npt.NDArray[np.bool_]]:
    """The gather of what these sequences see, and which of its [num_rows, length] positions that is."""
    first, end = seen.first[members], seen.end[members]
    first_block = first // step.block_size
    num_blocks = seen.blocks(step.block_size)[members]
    widest = int(num_blocks.max())
    # Columns past the end repeat the first block; they are dead.
    columns = np.arange(widest)[None, :]
    columns = first_block[:, None] + np.where(columns < num_blocks[:, None], columns, 0)
    blocks = step.block_tables[members[:, None], columns].astype(np.int64)
    if (blocks < 0).any():
        raise ValueError("a block table has a hole where it is read")
    head_rows = (blocks * step.heads)[None, :, None, :] + step.kv_rows[:, None, :, None]
    length = widest * step.block_size
    position = (first_block * step.block_size)[:, None] + np.arange(length)[None, :]
    live = (position >= first[:, None]) & (position < end[:, None])
    row, offset = (~live).nonzero()
    lane = np.arange(2)[:, None] * len(members) + row[None, :]  # [2, num_dead]
    dead = (lane[:, None, :] * step.num_kv_heads + np.arange(step.num_kv_heads)[None, :, None]) * length + offset
    gather = Gather(len(members), length, step.tensor(head_rows.reshape(-1)), step.tensor(dead.reshape(-1)))
    return gather, live


def _additive(step: Step, seen: npt.NDArray[np.bool_]) -> torch.Tensor:
    return step.tensor(np.where(seen, np.float32(0), np.float32(-np.inf))).to(step.dtype)
