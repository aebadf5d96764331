"""What KV kept in each type costs in perplexity, and what it takes: `python -m bench.perplexity --kv-dtype ...`.

Knows measured losses and the worker's own allocation. Sequences are counted in pools that are really allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.perplexity import BLOCK_SIZE, Measured
from worker import kv_cache
from worker.models.config import ModelConfig

ROOM = 256 * 1024**2
SEQUENCE_TOKENS = 256
BASE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Kept:
    """One type: its losses, and how many sequences have room in `ROOM`, of the model and with its heads 128 wide."""

    kv_dtype: str
    measured: Measured
    token_bytes: float
    sequences: int
    wide_sequences: int


def kept(kv_dtype: str, measured: Measured, config: ModelConfig) -> Kept:
    """Allocate pools as a worker does and count."""
    block_bytes, sequences = pool(kv_dtype, config)
    _, wide = pool(kv_dtype, replace(config, num_layers=1, windows=config.windows[:1], head_dim=128))
    return Kept(kv_dtype, measured, block_bytes / BLOCK_SIZE, sequences, wide)


def pool(kv_dtype: str, config: ModelConfig) -> tuple[int, int]:
    """Bytes of a block, and the sequences of `SEQUENCE_TOKENS` that a pool within `ROOM` holds at once."""
    computed = torch.float32
    count = ROOM // kv_cache.bytes_per_block(config, BLOCK_SIZE, computed, kv_dtype)
    cache = kv_cache.allocate(config, count, BLOCK_SIZE, dtype=computed, device=torch.device("cpu"), kv_dtype=kv_dtype)
    if cache.blocks.nbytes > ROOM:
        raise RuntimeError(f"{cache.blocks.nbytes} bytes of KV where {ROOM} were to be had")
    return cache.blocks[0].nbytes, cache.num_blocks // (SEQUENCE_TOKENS // BLOCK_SIZE)


def table(rows: Sequence[Kept]) -> str:
    """In markdown; against `BASE`, or the first type where that was not measured."""
    base = next((row for row in rows if row.kv_dtype == BASE), rows[0])
    room = f"in {ROOM >> 20} MiB"
    lines = [
        f"| KV | perplexity | against {base.kv_dtype} | bytes a token | sequences of {SEQUENCE_TOKENS} {room} "
        f"| against {base.kv_dtype} | with heads of 128 |",
        "|---" * 7 + "|",
    ]
    own = base.measured.perplexity()
    for row in rows:
        perplexity = row.measured.perplexity()
        cells = [row.kv_dtype, f"{perplexity:.4f}", f"{100 * (perplexity / own - 1):+.3f} %", f"{row.token_bytes:,.0f}"]
        cells += [f"{row.sequences:,}", f"{row.sequences / base.sequences:.3f} x"]
        cells += [f"{row.wide_sequences / base.wide_sequences:.3f} x"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\nThe last column counts sequences in one layer of the same number of heads, 128 wide, also {room}.")
    return "\n".join(lines)


def summary(rows: Sequence[Kept]) -> dict[str, object]:
    """All figures, for a machine."""
    return {
        row.kv_dtype: {
            "perplexity": row.measured.perplexity(),
            "token_bytes": row.token_bytes,
            "sequences": row.sequences,
            "wide_sequences": row.wide_sequences,
            "seconds": row.measured.seconds,
        }
        for row in rows
    }
