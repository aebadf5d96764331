"""The shapes that attention is timed on, their data, and what a few of their rows must be.

Invariant: blocks are shuffled and data is random, so neither order nor zeros flatter anybody.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

import kernels
from kernels import device
from kernels.configs import Tuning
from kernels.device_plan import DevicePlan
from kernels.step import Ints

BLOCK_SIZE = 16
# Together the layers' KV is far larger than any cache of a processor.
ROTATED_BYTES = 2 << 30
MOST_LAYERS = 64
BLOCKS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """`shared` positions are common to all sequences, or to those of each of `groups`. `target` is the time to reach,
    in floors: of memory for the bytes that must be read, or of the matrix unit for the products, whichever is more.
    KV is kept in `kept`, a format of `kernels.FORMATS`, or as it is computed where that is empty; it should then be
    `faster` times as fast as the shape `base`."""

    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    target: float
    shared: int = 0
    groups: int = 1
    heads: tuple[int, int, int] = (32, 8, 128)
    kept: str = ""
    base: str = ""
    faster: float = 1.0

    @property
    def vector_bytes(self) -> float:
        """Of one key or value of one head, its scale included."""
        return kernels.FORMATS[self.kept or "bfloat16"].row_bytes(BLOCK_SIZE, self.heads[2]) / BLOCK_SIZE

    @property
    def distinct_keys(self) -> int:
        return sum(self.context_lens) - self.shared * (len(self.context_lens) - self.groups)

    @property
    def bytes(self) -> int:
        """Moved at least, a layer."""
        num_heads, num_kv_heads, head_dim = self.heads
        kv = 2 * self.distinct_keys * num_kv_heads * self.vector_bytes
        return int(kv) + 4 * head_dim * sum(self.query_lens) * num_heads

    @property
    def operations(self) -> int:
        num_heads, _, head_dim = self.heads
        pairs = sum(q * c - q * (q - 1) // 2 for q, c in zip(self.query_lens, self.context_lens, strict=True))
        return 4 * pairs * num_heads * head_dim


def _decode(name: str, count: int, length: int, target: float, **more: object) -> Shape:
    return Shape(name, (1,) * count, (length,) * count, target, **more)  # type: ignore[arg-type]


K = 1024
SHAPES = (
    _decode("D1", 1, K, 8.0),
    _decode("D2", 1, 32 * K, 1.25),
    _decode("D3", 16, 4 * K, 1.10),
    _decode("D4", 64, 4 * K, 1.05),
    _decode("D4q8", 64, 4 * K, 1.16, kept="fp8", base="D4", faster=1.7),
    _decode("D4i8", 64, 4 * K, 1.16, kept="int8", base="D4", faster=1.7),
    _decode("D5", 256, K, 1.05),
    _decode("D6", 128, 8 * K, 1.05),
    Shape("D9", (1,) * 64, (32 * K, *(K,) * 63), 1.14),
    _decode("C1", 64, 2 * K + 256, 1.60, shared=2 * K),
    _decode("C2", 128, 4 * K + 512, 1.28, shared=4 * K),
    _decode("C3", 256, 8 * K + 512, 1.24, shared=8 * K),
    _decode("C4", 256, 8 * K + 512, 1.25, shared=8 * K, groups=4),
    _decode("C6", 64, 2 * K + 256, 5.5, shared=2 * K, heads=(8, 1, 128)),
    Shape("P1", (2 * K,), (2 * K,), 2.06),
    Shape("P2", (512,), (8 * K + 512,), 1.56),
    Shape("P3", (8 * K,), (8 * K,), 1.65),
    Shape("M1", (512, *(1,) * 63), (8 * K + 512, *(4 * K,) * 63), 1.14),
)
QUICK = ("D1", "D2", "D3", "D4", "D4q8", "D4i8", "D5", "D9", "C1", "C2", "C3", "C4", "C6", "P1", "P2", "P3", "M1")


@dataclass(frozen=True, slots=True)
class Setting:
    """A shape's data on the device: several layers of KV, one query each."""

    shape: Shape
    kv_cache: kernels.KV
    tables: Ints
    queries: list[torch.Tensor]

    @property
    def num_layers(self) -> int:
        return len(self.queries)

    def plan(self, tuned: Tuning) -> DevicePlan:
        shape = self.shape
        lens, contexts = np.array(shape.query_lens), np.array(shape.context_lens)
        return device.plan_attention(self.kv_cache, lens, contexts, self.tables, num_heads=shape.heads[0], tuned=tuned)

    def run(self, plan: DevicePlan, layer: int) -> torch.Tensor:
        scale = self.shape.heads[2] ** -0.5
        return device.attention(self.queries[layer], _layer(self.kv_cache, layer), plan, scale=scale)

    def dense(self, layer: int, sequence: int) -> torch.Tensor:
        """Keys and values of a sequence as they are read, `[2, num_kv_heads, context_len, head_dim]`."""
        length = self.shape.context_lens[sequence]
        blocks = torch.from_numpy(self.tables[sequence, : -(-length // BLOCK_SIZE)]).to(self.kv_cache.device)
        if isinstance(self.kv_cache, kernels.StoredKV):
            rows = self.kv_cache.rows[blocks, layer].contiguous()
            kept = replace(self.kv_cache, rows=rows)
            found = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
            kept.gather(torch.arange(rows[..., 0].numel(), device=rows.device), found.flatten(0, 2).flatten(1))
        else:
            found = self.kv_cache[blocks, layer]
        return found.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]

    def error(self, out: torch.Tensor, layer: int) -> float:
        """The largest relative error of some rows of `layer`'s result: first, last and a few between."""
        shape, worst, token = self.shape, 0.0, 0
        num_heads, num_kv_heads, head_dim = shape.heads
        chosen = set(np.linspace(0, len(shape.query_lens) - 1, 5).astype(int).tolist())
        for sequence, (count, length) in enumerate(zip(shape.query_lens, shape.context_lens, strict=True)):
            for row in {0, 1, count // 2, count - 1} & set(range(count)) if sequence in chosen else ():
                keys, values = self.dense(layer, sequence)[:, :, : length - count + row + 1].float()
                query = self.queries[layer][token + row].float().view(num_kv_heads, -1, head_dim)
                scores = torch.matmul(query, keys.transpose(1, 2)) * head_dim**-0.5
                expected = torch.matmul(scores.softmax(-1), values).view(num_heads, head_dim)
                difference = (out[token + row].float() - expected).norm() / expected.norm()
                worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
            token += count
        return worst


def make_setting(shape: Shape, place: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Setting:
    num_heads, num_kv_heads, head_dim = shape.heads
    tables = block_tables(shape)
    num_blocks = int(tables.max()) + 1
    per_block = int(2 * num_kv_heads * BLOCK_SIZE * shape.vector_bytes)
    num_layers = min(MOST_LAYERS, max(1, -(-ROTATED_BYTES // (num_blocks * per_block))))
    size = (num_blocks, num_layers, 2, num_kv_heads, BLOCK_SIZE, head_dim)
    kv_cache = (
        _random_kept(size, shape.kept, dtype, place)
        if shape.kept
        else torch.empty(size, dtype=dtype, device=place).normal_()
    )
    tokens = sum(shape.query_lens)
    queries = [torch.randn(tokens, num_heads, head_dim, device=place).to(dtype) for _ in range(num_layers)]
    return Setting(shape, kv_cache, tables, queries)


def _random_kept(
    size: tuple[int, int, int, int, int, int], kept: str, dtype: torch.dtype, place: str
) -> kernels.StoredKV:
    """Some blocks at a time, as their vectors are much larger than they are."""
    cache = kernels.stored(size, kernels.FORMATS[kept], dtype, place)
    head_rows = size[1] * 2 * size[3]
    for first in range(0, size[0], BLOCKS_AT_ONCE):
        rows = cache.rows[first : first + BLOCKS_AT_ONCE]
        vectors = torch.empty(len(rows) * head_rows * BLOCK_SIZE, size[5], dtype=dtype, device=place).normal_()
        replace(cache, rows=rows).write(vectors, torch.arange(len(vectors), device=place))
    return cache


def _layer(kv_cache: kernels.KV, layer: int) -> kernels.KV:
    return kv_cache.layer(layer) if isinstance(kv_cache, kernels.StoredKV) else kv_cache[:, layer]


def block_tables(shape: Shape) -> Ints:
    """`[num_seqs, blocks of the longest context]`, -1 behind a sequence's end; every block of a cache is somebody's."""
    widths = [-(-length // BLOCK_SIZE) for length in shape.context_lens]
    shared = shape.shared // BLOCK_SIZE
    num_blocks = sum(widths) - shared * (len(widths) - shape.groups)
    order, taken = np.random.default_rng(1).permutation(num_blocks), shared * shape.groups
    tables = np.full((len(widths), max(widths)), -1, dtype=np.int64)
    for row, width in enumerate(widths):
        group = row % shape.groups
        tables[row, :shared] = order[group * shared : (group + 1) * shared]
        tables[row, shared:width] = order[taken : taken + width - shared]
        taken += width - shared
    return tables
