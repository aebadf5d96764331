"""One step of attention in a fixed order, for plain torch: every row takes its keys in the same pieces in any step.

Knows lengths and block numbers only. Invariant: a piece is a run of positions that begins at a multiple of its length
from the sequence's start, and a tile takes its pieces in order, the sinks' first; both follow from a token's position
and never from the batch, the chunk or what was cached.

A tile is a few consecutive tokens of a sequence: `rows` query rows, one for each of their heads that share keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.plan import LARGEST_GATHER, Gather, slot_rows
from kernels.quantize import KV
from kernels.step import Ints, Step, checked_step
from kernels.work_list import expanded

ROWS = 16
KEYS = 128


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces that are gathered at once: each of another tile, or all the same keys for consecutive tiles."""

    gather: Gather
    sinks: bool  # scored by the query that is turned for them
    tiles: slice | torch.Tensor
    runs: tuple[tuple[slice | torch.Tensor, slice], ...]  # tiles, each once, and which of the pieces are theirs
    partial: torch.Tensor  # [num_partial] int64: pieces of which some row does not see every key
    mask: torch.Tensor  # [num_partial, 1, rows, keys] float32, 0 or -inf


@dataclass(frozen=True, slots=True)
class FixedWork:
    """All attention of a step for layers with one window."""

    pieces: tuple[Pieces, ...]

    @property
    def largest_gather(self) -> int:
        """In head rows."""
        return max((piece.gather.head_rows.numel() for piece in self.pieces), default=0)


@dataclass(frozen=True, slots=True)
class FixedPlan:
    """What `write_kv` and `attention` do in every layer of a step."""

    num_tokens: int
    slot_rows: torch.Tensor  # as of `kernels.plan.AttentionPlan`
    rows: int  # of a tile
    tile_tokens: torch.Tensor  # [num_tiles, tokens of a tile] int64, num_tokens where there is none
    token_places: torch.Tensor  # [num_tokens] int64: where each token is in `tile_tokens`
    work: dict[int | None, FixedWork]  # by window
    sink_work: frozenset[int]  # windows that some sequence is longer than, where they have sinks
    workspace: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Tiles:
    sequence: Ints  # [num_tiles]
    first: Ints  # position of the first token
    count: Ints  # tokens
    alone: npt.NDArray[np.bool_]  # whether the sequence has no other tile in this step
    row_positions: Ints  # [num_tiles, rows], -1 where there is no token


@dataclass(frozen=True, slots=True)
class _List:
    """Pieces as columns."""

    tile: Ints
    sinks: npt.NDArray[np.bool_]
    number: Ints  # in the order of its tile
    index: Ints  # positions from index * keys on

    def of(self, chosen: Ints) -> _List:
        return _List(self.tile[chosen], self.sinks[chosen], self.number[chosen], self.index[chosen])


def plan_attention(
    kv_cache: KV,
    query_lens: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    block_tables: Ints,
    *,
    num_heads: int,
    windows: Sequence[int | None] = (None,),
    sinks: Mapping[int, int] | None = None,
) -> FixedPlan:
    """As `kernels.plan_attention` in deterministic mode."""
    step = checked_step(kv_cache, query_lens, context_lens, block_tables)
    sinks = {window: count for window, count in (sinks or {}).items() if count}
    group = num_heads // step.num_kv_heads
    tiles, tile_tokens = _tiles(step, group)
    work = {
        window: _work(step, tiles, window, 0 if window is None else sinks.get(window, 0))
        for window in dict.fromkeys(windows)
    }
    places = np.flatnonzero(tile_tokens.reshape(-1) < step.num_tokens)
    longest = int(step.context_lens.max(initial=0))
    room = max(of.largest_gather for of in work.values()) * step.block_size * step.head_dim
    return FixedPlan(
        num_tokens=step.num_tokens,
        slot_rows=step.tensor(slot_rows(step)),
        rows=tiles.row_positions.shape[1],
        tile_tokens=step.tensor(tile_tokens),
        token_places=step.tensor(places),
        work=work,
        sink_work=frozenset(window for window in work if window in sinks and longest > (window or 0)),
        workspace=torch.empty(room, dtype=step.dtype, device=step.device),
    )


def _tiles(step: Step, group: int) -> tuple[_Tiles, Ints]:
    """All tiles, sequence by sequence, and their tokens."""
    rows = max(ROWS, group)
    most = rows // group
    per_sequence = -(-step.query_lens // most)
    sequence, number = expanded(per_sequence)
    begin = number * most
    count = np.minimum(most, step.query_lens[sequence] - begin)
    first = (step.context_lens - step.query_lens)[sequence] + begin
    offset = np.arange(most)[None, :]
    tokens = (step.query_starts[sequence] + begin)[:, None] + offset
    tokens = np.where(offset < count[:, None], tokens, step.num_tokens)
    of_row = np.arange(rows)[None, :] // group
    positions = np.where(of_row < count[:, None], first[:, None] + of_row, -1)
    return _Tiles(sequence, first, count, per_sequence[sequence] == 1, positions), tokens


def _work(step: Step, tiles: _Tiles, window: int | None, sinks: int) -> FixedWork:
    keys = _keys(step)
    pieces = _listed(tiles, keys, window, sinks)
    made = []
    # Sequences of one tile have their pieces read together, others a piece at a time for all of their tiles.
    single = pieces.of(np.flatnonzero(tiles.alone[pieces.tile]))
    single = single.of(np.lexsort((single.tile, single.number, ~single.sinks)))
    for run in _bounded(single, 2 * step.num_kv_heads * keys * step.head_dim):
        made.append(_pieces(step, tiles, single.of(run), (window, sinks)))
    several = pieces.of(np.flatnonzero(~tiles.alone[pieces.tile]))
    sequence = tiles.sequence[several.tile]
    several = several.of(np.lexsort((several.tile, several.index, ~several.sinks, sequence)))
    sequence = tiles.sequence[several.tile]
    for run in _same(sequence, several.sinks, several.index):
        made.append(_pieces(step, tiles, several.of(run), (window, sinks)))
    return FixedWork(tuple(made))


def _keys(step: Step) -> int:
    """Positions of a piece: whole blocks."""
    return -(-KEYS // step.block_size) * step.block_size


def _listed(tiles: _Tiles, keys: int, window: int | None, sinks: int) -> _List:
    """The pieces of every tile in its order."""
    end = tiles.first + tiles.count
    begin = np.zeros_like(end) if window is None else np.maximum(0, tiles.first - window + 1)
    far = np.zeros_like(end) if window is None else np.maximum(0, np.minimum(sinks, end - window))
    num_far = -(-far // keys)
    tile, number = expanded(num_far + -(-end // keys) - begin // keys)
    is_sink = number < num_far[tile]
    return _List(tile, is_sink, number, np.where(is_sink, number, number - num_far[tile] + begin[tile] // keys))


def _bounded(pieces: _List, elements: int) -> Iterator[Ints]:
    """Runs of pieces of one kind that are not too many to gather at once."""
    most = max(1, LARGEST_GATHER // elements)
    for kind in (True, False):
        of_kind = np.flatnonzero(pieces.sinks == kind)
        for begin in range(0, len(of_kind), most):
            yield of_kind[begin : begin + most]


def _same(*columns: npt.NDArray[np.generic]) -> Iterator[Ints]:
    """Runs in which every column stays the same."""
    if not len(columns[0]):
        return
    new = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    yield from np.split(np.arange(len(columns[0])), np.flatnonzero(new) + 1)


def _pieces(step: Step, tiles: _Tiles, listed: _List, window_sinks: tuple[int | None, int]) -> Pieces:
    """Pieces of one kind: of several sequences with one tile each, or of one sequence and one index."""
    shared = not tiles.alone[listed.tile[0]]
    sources = listed.of(np.arange(1)) if shared else listed
    seen, full = _seen(tiles, listed, _keys(step), window_sinks)
    partial = np.flatnonzero(~full)
    mask = np.where(seen[partial], np.float32(0), np.float32(-np.inf))[:, None]
    if shared:
        tile: slice | torch.Tensor = slice(int(listed.tile[0]), int(listed.tile[-1]) + 1)
        runs: list[tuple[slice | torch.Tensor, slice]] = [(tile, slice(0, len(listed.tile)))]
    else:
        tile = step.tensor(listed.tile)
        runs = [(step.tensor(listed.tile[run]), slice(int(run[0]), int(run[-1]) + 1)) for run in _same(listed.number)]
    gather = _gather(step, tiles.sequence[sources.tile], sources, window_sinks)
    return Pieces(gather, bool(listed.sinks[0]), tile, tuple(runs), step.tensor(partial), step.tensor(mask))


def _seen(
    tiles: _Tiles, pieces: _List, keys: int, window_sinks: tuple[int | None, int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which keys each row of each piece sees, `[num_pieces, rows, keys]`, and where that is all for every token."""
    window, sinks = window_sinks
    rows = tiles.row_positions[pieces.tile][:, :, None]
    key = (pieces.index * keys)[:, None, None] + np.arange(keys)
    if window is None:
        seen = key <= rows
    elif pieces.sinks[0]:
        seen = (key < sinks) & (key <= rows - window)
    else:
        seen = (key <= rows) & (key > rows - window)
    seen &= rows >= 0
    full: npt.NDArray[np.bool_] = np.all(seen | (rows < 0), axis=(1, 2))
    return seen, full


def _gather(step: Step, sequences: Ints, sources: _List, window_sinks: tuple[int | None, int]) -> Gather:
    """The gather of what may be read of these runs of positions; the rest is dead."""
    window, sinks = window_sinks
    kind = step.seen_sinks(window, sinks) if window is not None and sources.sinks[0] else step.seen(window)
    first, end = kind.first[sequences], kind.end[sequences]
    keys = _keys(step)
    per_piece = keys // step.block_size
    position = (sources.index * keys)[:, None] + np.arange(keys)[None, :]
    live = (position >= first[:, None]) & (position < end[:, None])
    columns = (sources.index * per_piece)[:, None] + np.arange(per_piece)[None, :]
    read = live.reshape(len(sequences), per_piece, step.block_size).any(-1)
    # In place of a block that is not read stands one that is; all of it is dead.
    stand_in = np.take_along_axis(columns, read.argmax(-1)[:, None], 1)
    blocks = step.block_tables[sequences[:, None], np.where(read, columns, stand_in)].astype(np.int64)
    if (blocks < 0).any():
        raise ValueError("a block table has a hole where it is read")
    head_rows = (blocks * step.heads)[None, :, None, :] + step.kv_rows[:, None, :, None]
    row, offset = (~live).nonzero()
    lane = np.arange(2)[:, None] * len(sequences) + row[None, :]
    dead = (lane[:, None, :] * step.num_kv_heads + np.arange(step.num_kv_heads)[None, :, None]) * keys + offset
    return Gather(len(sequences), keys, step.tensor(head_rows.reshape(-1)), step.tensor(dead.reshape(-1)))
