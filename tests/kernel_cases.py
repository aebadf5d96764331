"""The case table of attention over a paged cache, and what each case must give, computed plainly in float64.

Every position that a case must not read is NaN, in unused blocks and behind the end of used ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import kernels


@dataclass(frozen=True)
class Case:
    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    heads: tuple[int, int, int] = (4, 2, 16)  # num_heads, num_kv_heads, head_dim
    block_size: int = 8
    window: int | None = None
    shared_blocks: int = 0  # leading blocks that all sequences have in common
    sinks: int = 0
    tree: tuple[int, ...] = ()  # leading blocks that each sequence has in common with the first one

    @property
    def shared(self) -> tuple[int, ...]:
        """Leading blocks of each sequence that are those of the first one."""
        return self.tree or (self.shared_blocks,) * len(self.query_lens)

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("one token, empty cache", (1,), (1,)),
    Case("decode inside a block", (1,), (5,)),
    Case("decode at a block's end", (1, 1), (8, 16)),
    Case("decode at a block's start", (1, 1), (9, 17)),
    Case("decode of skewed lengths", (1,) * 9, (300, 1, 2, 299, 64, 65, 128, 7, 150)),
    Case("whole prompt", (37,), (37,)),
    Case("prompt of one block", (8,), (8,)),
    Case("chunk after a prefix", (5,), (61,)),
    Case("chunk that starts inside a block", (20,), (33,)),
    Case("mixed batch", (1, 12, 1, 30, 3), (40, 12, 9, 95, 64)),
    Case("prompt of several tiles", (300,), (350,)),
    Case("odd heads", (1, 7, 1), (11, 20, 64), heads=(3, 1, 80)),
    Case("a key head for each query head", (1, 9), (33, 9), heads=(4, 4, 8)),
    Case("block of 16", (1, 21), (100, 47), block_size=16),
    Case("block of 1", (1, 3), (10, 7), block_size=1),
    Case("window, decode", (1, 1, 1), (5, 21, 90), window=21),
    Case("window, mixed batch", (1, 50, 6, 1), (200, 50, 77, 3), window=13),
    Case("window of one", (1, 4), (9, 12), window=1),
    Case("window, several tiles", (530,), (540,), window=260, heads=(2, 1, 8)),
    Case("shared prefix", (1, 1, 5, 1), (70, 66, 69, 80), shared_blocks=8),
    Case("shared prefixes in a tree", (1,) * 8, (70, 66, 39, 80, 41, 70, 17, 5), tree=(8, 8, 4, 8, 4, 6, 2, 0)),
    Case("shared prefix, many heads", (1,) * 5, (70, 66, 65, 80, 130), heads=(24, 1, 16), shared_blocks=8),
    Case("sinks, decode", (1, 1, 1, 1, 1), (5, 21, 22, 30, 190), window=21, sinks=4),
    Case("sinks, decode of many", (1,) * 12, tuple(range(13, 400, 33)), window=16, sinks=16),
    Case("sinks, mixed batch", (1, 50, 6, 1, 9, 40), (200, 50, 77, 3, 9, 133), window=13, sinks=5),
    Case("sinks, whole prompt", (90,), (90,), window=17, sinks=9),
    Case("sinks over several blocks", (1, 12), (150, 99), window=24, sinks=27),
    Case("sinks wider than the window", (1, 7, 1), (12, 15, 60), window=4, sinks=24),
    Case("sinks, a window of one", (1, 4), (9, 40), window=1, sinks=1),
    Case("sinks, block of 1", (1, 3), (30, 27), block_size=1, window=5, sinks=3),
    Case("sinks, several tiles", (530,), (600,), window=260, sinks=8, heads=(2, 1, 8)),
    Case("sinks, odd heads", (1, 7, 1), (41, 60, 64), heads=(3, 1, 80), window=16, sinks=3),
)


@dataclass
class Problem:
    """A case with data: all keys and values in float64, as the cache keeps them, and a cache that holds those before
    the step."""

    case: Case
    kv_cache: kernels.KV
    layer: int
    block_tables: np.ndarray
    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    sink_query: torch.Tensor  # the same shape: what scores the sinks
    key_value: torch.Tensor  # [num_tokens, 2 * num_kv_heads, head_dim], the step's own
    contexts: list[torch.Tensor]  # per sequence [context_len, 2, num_kv_heads, head_dim]

    @property
    def num_tokens(self) -> int:
        return sum(self.case.query_lens)

    def slots(self) -> set[tuple[int, int]]:
        """(block, offset) of every position of every context."""
        size = self.case.block_size
        return {
            (int(table[position // size]), position % size)
            for table, length in zip(self.block_tables, self.case.context_lens, strict=True)
            for position in range(length)
        }

    def run(self, operations: Any = kernels, **options: Any) -> torch.Tensor:
        """Write and attend with the kernels, in the cache's dtype on its device; `options` are for the plan."""
        layer_kv = layer_of(self.kv_cache, self.layer)
        lens, contexts = self.case.query_lens, self.case.context_lens
        window, sinks = self.case.window, self.case.sinks
        plan = operations.plan_attention(
            self.kv_cache,
            lens,
            contexts,
            self.block_tables,
            num_heads=self.case.heads[0],
            windows=[window],
            sinks={window: sinks} if window is not None else None,
            **options,
        )
        operations.write_kv(self.key_value, layer_kv, plan)
        scale = self.query.shape[2] ** -0.5
        if window is None or not sinks:
            return operations.attention(self.query, layer_kv, plan, scale=scale, window=window)
        return operations.sink_attention(self.query, self.sink_query, layer_kv, plan, scale=scale, window=window)

    def expected(self) -> torch.Tensor:
        """[num_tokens, num_heads, head_dim] in float64 on the CPU."""
        num_heads, num_kv_heads, head_dim = self.case.heads
        rows = iter(zip(self.query.cpu().double(), self.sink_query.cpu().double(), strict=True))
        grouped = (num_kv_heads, num_heads // num_kv_heads, head_dim)
        out = []
        for count, length, context in zip(self.case.query_lens, self.case.context_lens, self.contexts, strict=True):
            for position in range(length - count, length):
                first = 0 if self.case.window is None else max(0, position - self.case.window + 1)
                sinks = min(self.case.sinks, first)
                query, sink_query = (row.view(grouped) for row in next(rows))
                keys, values = torch.cat((context[:sinks], context[first : position + 1])).unbind(1)
                near = torch.einsum("hgd,lhd->hgl", query, keys[sinks:])
                far = torch.einsum("hgd,lhd->hgl", sink_query, keys[:sinks])
                scores = torch.cat((far, near), -1) * head_dim**-0.5
                out.append(torch.einsum("hgl,lhd->hgd", scores.softmax(-1), values).reshape(num_heads, head_dim))
        return torch.stack(out)


def layer_of(kv_cache: kernels.KV, layer: int) -> kernels.KV:
    return kv_cache.layer(layer) if isinstance(kv_cache, kernels.StoredKV) else kv_cache[:, layer]


def poison(kv_cache: kernels.KV, block: int | slice = slice(None)) -> None:
    """NaN wherever there is room for one: in scales, and in what has none."""
    if isinstance(kv_cache, kernels.StoredKV):
        kv_cache.rows[block] = 0xFF
    else:
        kv_cache[block] = torch.nan


def make_problem(case: Case, dtype: torch.dtype, device: str, kv_format: kernels.KVFormat | None = None) -> Problem:
    rng = np.random.default_rng(sum(case.name.encode()))
    num_heads, num_kv_heads, head_dim = case.heads
    num_layers, layer = 3, 1
    widths = [-(-length // case.block_size) for length in case.context_lens]
    num_blocks = sum(widths) + 5
    order = rng.permutation(num_blocks)
    block_tables = np.full((len(widths), max(widths)), -1, dtype=np.int64)
    shape = (num_blocks, num_layers, 2, num_kv_heads, case.block_size, head_dim)
    kv_cache = torch.empty(shape, dtype=dtype) if kv_format is None else kernels.stored(shape, kv_format, dtype, "cpu")
    poison(kv_cache)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    longest = max(case.shared)
    common = normal(longest * case.block_size, 2, num_kv_heads, head_dim)
    contexts, steps, taken = [], [], longest
    for row, (count, length) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        shared = case.shared[row]
        own = widths[row] - shared
        block_tables[row, :shared] = order[:shared]
        block_tables[row, shared : widths[row]] = order[taken : taken + own]
        taken += own
        before = common[: shared * case.block_size]
        context = torch.cat((before, normal(length - len(before), 2, num_kv_heads, head_dim)))
        for position in range(length - count):
            place = (block_tables[row, position // case.block_size], position % case.block_size)
            put(layer_of(kv_cache, layer), *place, context[position])
        contexts.append((context if kv_format is None else kept(context, kv_format)).double())
        steps.append(context[length - count :].flatten(1, 2))
    query = normal(sum(case.query_lens), num_heads, head_dim).to(device)
    sink_query = normal(*query.shape).to(device)
    step = torch.cat(steps).to(device)
    there = moved(kv_cache, device)
    return Problem(case, there, layer, block_tables, query, sink_query, step, contexts)


def put(layer_kv: kernels.KV, block: int, offset: int, vectors: torch.Tensor) -> None:
    """Place `vectors[2, num_kv_heads, head_dim]` of one position."""
    if not isinstance(layer_kv, kernels.StoredKV):
        layer_kv[block, :, :, offset] = vectors
        return
    values, scales = layer_kv.format.encode(vectors.flatten(0, 1))
    layer_kv.values[block, :, :, offset].view(torch.uint8).copy_(values.view(*vectors.shape[:2], -1))
    if layer_kv.format.largest:
        layer_kv.scales[block, :, :, offset] = scales.view(torch.bfloat16).view(vectors.shape[:2])


def kept(vectors: torch.Tensor, kv_format: kernels.KVFormat) -> torch.Tensor:
    """What comes back of `vectors[..., head_dim]`, in float32."""
    values, scales = kv_format.encode(vectors.reshape(-1, vectors.shape[-1]))
    out = torch.empty((len(values), 1, vectors.shape[-1]))
    kv_format.decode(values[:, None], scales[:, None], out)
    return out.view(vectors.shape)


def moved(kv_cache: kernels.KV, device: str) -> kernels.KV:
    if isinstance(kv_cache, kernels.StoredKV):
        return replace(kv_cache, rows=kv_cache.rows.to(device))
    return kv_cache.to(device)


def leave_window(problem: Problem) -> int:
    """Take away the blocks that no query of the step may read: NaN in the cache, a hole in the table. How many."""
    case, taken = problem.case, 0
    if case.window is None:
        return 0
    for table, count, length in zip(problem.block_tables, case.query_lens, case.context_lens, strict=True):
        first = max(0, length - count - case.window + 1) // case.block_size
        for index in range(-(-case.sinks // case.block_size), first):
            poison(problem.kv_cache, int(table[index]))
            table[index] = -1
            taken += 1
    return taken
