"""One step as attention sees it: lengths and block tables of its sequences, checked, and the cache's shape.

Knows numbers only. Invariant: every query is one of its sequence's context, and the block tables cover it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.quantize import KV

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Step:
    """The arguments of `plan_attention`, checked and in one place."""

    query_starts: Ints  # [num_seqs], first of num_tokens
    query_lens: Ints  # [num_seqs]
    context_lens: Ints  # [num_seqs]
    block_tables: npt.NDArray[np.int32]  # [num_seqs, blocks of the longest context]
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def heads(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads

    @property
    def kv_rows(self) -> Ints:
        """Head rows of one layer within a block: [2, num_kv_heads]."""
        return np.arange(2 * self.num_kv_heads).reshape(2, self.num_kv_heads)

    @property
    def num_tokens(self) -> int:
        return int(self.query_lens.sum())

    def positions(self) -> tuple[Ints, Ints]:
        """The sequence of each token, and its position there: [num_tokens] each."""
        sequence = np.repeat(np.arange(len(self.query_lens)), self.query_lens)
        offset = np.arange(len(sequence)) - self.query_starts[sequence]
        return sequence, (self.context_lens - self.query_lens)[sequence] + offset

    def slots(self) -> Ints:
        """Where each token's keys and values are written: [num_tokens]. Raises ValueError on a hole there."""
        sequence, position = self.positions()
        block = self.block_tables[sequence, position // self.block_size].astype(np.int64)
        if (block < 0).any():
            raise ValueError("a block table has a hole where the step writes")
        slots: Ints = block * self.block_size + position % self.block_size
        return slots

    def seen(self, window: int | None) -> Range:
        """What the queries of each sequence see, all together, sinks aside."""
        starts = self.context_lens - self.query_lens
        first = np.maximum(starts - (window - 1), 0) if window is not None else np.zeros_like(starts)
        return Range(first, self.context_lens)

    def seen_sinks(self, window: int, sinks: int) -> Range:
        """What they see of the first positions before their window: empty where the end is below 1."""
        return Range(np.zeros_like(self.context_lens), np.minimum(self.context_lens - window, sinks))

    def tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """A step in one array of int64, the parts one after the other: `query_lens[num_seqs]`, `context_lens[num_seqs]`,
    `wanted[num_wanted]`, `token_ids[num_tokens]`, `block_tables[num_seqs, width]`, padded with -1. `wanted` are the
    numbers of the sequences, in order, after whose last token something is drawn."""

    numbers: array[int]  # 'q'
    num_seqs: int
    num_wanted: int
    num_tokens: int
    width: int

    @property
    def is_whole(self) -> bool:
        """Whether the array has as many numbers as the parts say."""
        return len(self.numbers) == self.num_seqs * (2 + self.width) + self.num_wanted + self.num_tokens

    @property
    def query_lens(self) -> Ints:
        return self._part(0, self.num_seqs)

    @property
    def context_lens(self) -> Ints:
        return self._part(self.num_seqs, self.num_seqs)

    @property
    def wanted(self) -> Ints:
        return self._part(2 * self.num_seqs, self.num_wanted)

    @property
    def token_ids(self) -> Ints:
        return self._part(2 * self.num_seqs + self.num_wanted, self.num_tokens)

    @property
    def block_tables(self) -> Ints:
        first = 2 * self.num_seqs + self.num_wanted + self.num_tokens
        return self._part(first, self.num_seqs * self.width).reshape(self.num_seqs, self.width)

    def set_token(self, index: int, token_id: int) -> None:
        """Another id for one of the tokens."""
        self.numbers[2 * self.num_seqs + self.num_wanted + index] = token_id

    def _part(self, first: int, count: int) -> Ints:
        return np.frombuffer(self.numbers, np.int64, count, 8 * first)


@dataclass(frozen=True, slots=True)
class Range:
    """Positions [first, end) that the queries of each sequence see, all together."""

    first: Ints  # [num_seqs]
    end: Ints  # [num_seqs]

    def blocks(self, size: int) -> Ints:
        """How many blocks they are in: [num_seqs]."""
        count: Ints = -(-self.end // size) - self.first // size
        return count


def checked_step(
    kv_cache: KV,
    query_lens: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    block_tables: Ints,
) -> Step:
    """Raises ValueError on lengths that cannot be."""
    _, num_layers, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    lens = np.asarray(query_lens, dtype=np.int64)
    contexts = np.asarray(context_lens, dtype=np.int64)
    if (lens < 1).any() or (contexts < lens).any():
        raise ValueError("a sequence computes at least one token and at most its context")
    if contexts.size and int(contexts.max()) > block_tables.shape[1] * block_size:
        raise ValueError("a block table does not cover its context")
    return Step(
        query_starts=np.cumsum(lens) - lens,
        query_lens=lens,
        context_lens=contexts,
        block_tables=np.ascontiguousarray(block_tables[:, : -(-int(contexts.max(initial=0)) // block_size)], np.int32),
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        dtype=kv_cache.dtype,
        device=kv_cache.device,
    )
