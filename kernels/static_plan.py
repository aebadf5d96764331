"""Plans of decoding steps in buffers that stay where they are, so that recorded launches can be replayed with another
step's plan.

Knows numbers and one device. Invariant: what fills up a list reads the first row at most and writes nothing, so a step
in a larger plan's buffers gives what it gives alone; a step that does not fit is refused, never cut.

All numbers of a plan are one int32 buffer, with room for the most of each list; the block tables are its end, of which
only what the step needs is sent. Grids are the lists' rooms: a program whose item fills up the list ends at once.
Nothing of this has run on a GPU yet, and what empty programs cost has not been measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kernels.configs import Tuning
from kernels.device_plan import DevicePlan, DeviceWork, device_tuning, side_stream
from kernels.quantize import KV
from kernels.step import Ints, Step, checked_step
from kernels.work_list import SLOT, WorkList, work_list

Lists = dict[int | None, WorkList]

MOST_TABLE_ENTRIES = 1 << 18
DECODE_EMPTY = (0, 0, 0, 0, -1, 0, 0, 0)
WIDE_EMPTY = tuple(-1 if column == SLOT else 0 for column in range(12))
# Which number of an item is its table's row; in static plans it is where the row begins.
DECODE_TABLE, WIDE_TABLE = 1, 2


@dataclass(frozen=True, slots=True)
class Rooms:
    """The most of each list that a static plan of `batch` tokens takes."""

    decode: int
    wide: int
    tokens: int
    part_slots: int
    merges: int

    @classmethod
    def of(cls, batch: int, num_kv_heads: int, tuned: Tuning, *, shares: bool) -> Rooms:
        places = -(-tuned.processor.multiprocessors * tuned.decode.resident // num_kv_heads)
        decode = places + 4 * batch
        if not shares:
            return cls(decode, 0, 0, decode, 0)
        return cls(decode, places + batch, 8 * batch, decode + 16 * batch, batch)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What all static plans of a cache use one after the other: as in `DevicePlan`."""

    parts: torch.Tensor
    states: torch.Tensor
    counters: torch.Tensor


class StaticPlans:
    """Static plans for steps of up to the largest of `sizes` sequences that compute one token each, in two kinds: with
    room for prefixes that are read once for several sequences, and without."""

    def __init__(
        self,
        kv_cache: KV,
        sizes: Sequence[int],
        *,
        num_heads: int,
        windows: Sequence[int | None] = (None,),
        sinks: Mapping[int, int] | None = None,
        max_blocks: int = MOST_TABLE_ENTRIES,
        tuned: Tuning | None = None,
    ) -> None:
        """`max_blocks` of a sequence; the rest as `kernels.plan_attention`."""
        tuned = tuned or device_tuning(kv_cache)
        self._tuned = replace(tuned, many=tuned.wide)  # how many rows a program has is recorded
        self._kv_cache, self._num_heads = kv_cache, num_heads
        self._windows, self._sinks = tuple(dict.fromkeys(windows)), dict(sinks or {})
        num_kv_heads = kv_cache.shape[3]
        kinds = (False, True) if None in self._windows and tuned.share is not False else (False,)
        keys = [(size, shares) for shares in kinds for size in sorted(sizes)]
        rooms = {key: Rooms.of(key[0], num_kv_heads, self._tuned, shares=key[1]) for key in keys}
        scratch = self._scratch(max(of.part_slots for of in rooms.values()), max(sizes))
        # A step of one token a sequence has wide items for shared prefixes alone.
        group = num_heads // num_kv_heads
        self._rows = max(self._tuned.wide.rows, 1 << (group - 1).bit_length())
        self.plans = {
            key: self._plan(key[0], room, scratch, min(key[0] * max_blocks, MOST_TABLE_ENTRIES))
            for key, room in rooms.items()
        }

    def filled(
        self, token_ids: Ints, query_lens: Ints, context_lens: Ints, block_tables: Ints
    ) -> tuple[int, bool] | None:
        """The key of the smallest plan that now holds this step, None if none can; arguments as of
        `kernels.plan_attention`, and `token_ids[num_tokens]`. Raises what that raises."""
        if (query_lens != 1).any():
            return None
        key = next((key for key in self.plans if key[0] >= len(query_lens)), None)
        if key is None:
            return None
        step = checked_step(self._kv_cache, query_lens, context_lens, block_tables)
        lists = {
            window: work_list(step, self._num_heads, window, self._sinks.get(window or 0, 0), self._tuned)
            for window in self._windows
        }
        key = (key[0], any(len(made.wide) for made in lists.values()))
        plan = self.plans.get(key)
        return key if plan is not None and plan.fill(token_ids, step, lists) else None

    def _scratch(self, slots: int, tokens: int) -> Scratch:
        num_kv_heads, head_dim, device = self._kv_cache.shape[3], self._kv_cache.shape[5], self._kv_cache.device
        return Scratch(
            parts=torch.empty((slots, self._num_heads, head_dim), dtype=torch.float32, device=device),
            states=torch.empty((slots, self._num_heads), dtype=torch.float32, device=device),
            counters=torch.zeros((tokens, num_kv_heads), dtype=torch.int32, device=device),
        )

    def _plan(self, batch: int, rooms: Rooms, scratch: Scratch, table_entries: int) -> StaticPlan:
        sections: dict[Any, tuple[int, ...]] = {"token_ids": (0,) * batch, "slots": (-1,) * batch}
        sections["positions"] = (0,) * batch
        for window in self._windows:
            sections[window, "decode"] = DECODE_EMPTY * rooms.decode
            sections[window, "wide"] = WIDE_EMPTY * rooms.wide
            sections[window, "tokens"] = (0,) * rooms.tokens
            sections[window, "part_slots"] = (0,) * rooms.part_slots
            sections[window, "merges"] = (0, 0, 0) * rooms.merges
        buffer = _Buffer(sections, table_entries, self._kv_cache.device)
        part = buffer.parts
        plan = DevicePlan(
            num_tokens=batch,
            slots=part["slots"],
            positions=part["positions"],
            tables=buffer.tables.view(-1, 1),  # rows begin where an item says
            work={
                window: DeviceWork(
                    rows=self._rows,
                    decode=part[window, "decode"].view(rooms.decode, 8),
                    wide=part[window, "wide"].view(rooms.wide, 12),
                    tokens=part[window, "tokens"],
                    part_slots=part[window, "part_slots"],
                    merges=part[window, "merges"].view(rooms.merges, 3),
                )
                for window in self._windows
            },
            sink_work=frozenset(window for window in self._windows if window and self._sinks.get(window, 0)),
            parts=scratch.parts,
            states=scratch.states,
            counters=scratch.counters,
            side=side_stream(self._kv_cache.device),
            tuning=self._tuned,
        )
        return StaticPlan(part["token_ids"], plan, buffer)


class StaticPlan:
    """One plan whose tensors keep their addresses: `token_ids[batch]` and `plan`, of the step last filled in."""

    def __init__(self, token_ids: torch.Tensor, plan: DevicePlan, buffer: _Buffer) -> None:
        self.token_ids, self.plan, self._buffer = token_ids, plan, buffer

    def fill(self, token_ids: Ints, step: Step, lists: Lists) -> bool:
        """Send the step to the buffers; False, and nothing sent, where it has no room in them."""
        width = step.block_tables.shape[1]
        arrays: dict[Any, Ints] = {"token_ids": token_ids, "slots": step.slots(), "positions": step.positions()[1]}
        for window, made in lists.items():
            if len(made.wide) and made.rows != self.plan.work[window].rows:
                return False
            if made.num_slots > len(self.plan.states):
                return False
            decode, wide = made.decode.copy(), made.wide.copy()
            decode[:, DECODE_TABLE] *= width
            wide[:, WIDE_TABLE] *= width
            named = (("decode", decode), ("wide", wide), ("tokens", made.tokens if len(wide) else made.tokens[:0]))
            arrays |= {(window, name): array for name, array in named}
            arrays |= {(window, "part_slots"): made.part_slots, (window, "merges"): made.merges}
        return self._buffer.send(arrays, step.block_tables)


class _Buffer:
    """Sections of one int32 buffer on the device, each filled up with what it has where nothing is sent."""

    def __init__(self, sections: Mapping[Any, tuple[int, ...]], table_entries: int, device: torch.device) -> None:
        # They begin at multiples of 16 bytes: kernels are compiled for those.
        starts = np.cumsum([0, *(-(-len(section) // 4) * 4 for section in sections.values())]).tolist()
        self._empty = np.zeros(starts[-1], dtype=np.int32)
        self._places = dict(zip(sections, zip(starts, map(len, sections.values()), strict=False), strict=True))
        for (start, size), section in zip(self._places.values(), sections.values(), strict=True):
            self._empty[start : start + size] = section
        self._here = np.zeros(starts[-1] + table_entries, dtype=np.int32)
        self._here[: len(self._empty)] = self._empty
        self._there = torch.from_numpy(self._here.copy()).to(device)
        self.parts = {name: self._there[start : start + size] for name, (start, size) in self._places.items()}
        self.tables = self._there[starts[-1] :]

    def send(self, arrays: Mapping[Any, Ints], tables: np.ndarray[Any, np.dtype[np.int32]]) -> bool:
        if any(array.size > self._places[name][1] for name, array in arrays.items()):
            return False
        fixed = len(self._empty)
        if tables.size > len(self._here) - fixed:
            return False
        self._here[:fixed] = self._empty
        for name, array in arrays.items():
            start = self._places[name][0]
            self._here[start : start + array.size] = array.ravel()
        self._here[fixed : fixed + tables.size] = tables.ravel()
        used = fixed + tables.size
        # From memory that is not page-locked the call reads all before it returns: the next step may fill it again.
        self._there[:used].copy_(torch.from_numpy(self._here[:used]), non_blocking=True)
        return True
