"""What the block store costs: microseconds and bytes of bookkeeping a block, for pools of growing size.

Knows kvstore alone: no model, no tensors. Run as `python -m bench.block_pool [--json] [--blocks N ...]`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import tracemalloc
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass

from kvstore.block import NO_BLOCK, BlockId
from kvstore.block_key import KeyChain
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.scope import Region, scope_root

BLOCK_SIZE = 16
AT_ONCE = 64
"""Blocks of one allocation, and of one sequence."""

REGIONS = (Region(scope_root(b"bench", b"model", "tenant:a", block_size=BLOCK_SIZE), None),)


@dataclass(frozen=True, slots=True)
class Figures:
    """CPU microseconds a block, best of several rounds over the pool, and bytes a block."""

    num_blocks: int
    allocate_and_free_us: float
    seal_us: float
    evict_us: float
    attach_and_release_us: float
    bytes_empty: float
    bytes_sealed: float


def measure(num_blocks: int, rounds: int) -> Figures:
    """All figures for one size of pool."""
    bytes_empty, bytes_sealed = measure_memory(num_blocks)
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    allocate_and_free = best(rounds, lambda: allocate_and_free_all(pool))
    seal = best(1, lambda: seal_all(pool, 0))
    attach = best(rounds, lambda: attach_all(pool))
    evict = best(1, lambda: seal_all(pool, 1 << 20)) - seal
    per_block = 1e6 / num_blocks
    return Figures(
        num_blocks=num_blocks,
        allocate_and_free_us=round(allocate_and_free * per_block, 3),
        seal_us=round(seal * per_block, 3),
        evict_us=round(evict * per_block, 3),
        attach_and_release_us=round(attach * per_block, 3),
        bytes_empty=round(bytes_empty, 1),
        bytes_sealed=round(bytes_sealed, 1),
    )


def best(rounds: int, action: Callable[[], None]) -> float:
    """CPU seconds of the fastest round: what others do on the machine counts little."""
    taken = []
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    gc.enable()
    return min(taken)


def allocate_and_free_all(pool: BlockPool) -> None:
    """Every block of the pool is allocated, then all are given back in another order."""
    held: list[list[BlockId]] = []
    for _ in range(pool.num_blocks // AT_ONCE):
        blocks = pool.allocate(AT_ONCE)
        assert blocks is not None
        held.append(blocks)
    for blocks in held[::2] + held[1::2]:
        pool.release(blocks)


def texts(pool: BlockPool, first: int) -> list[array[int]]:
    """One prompt for each run of blocks, none with a block in common."""
    length = AT_ONCE * BLOCK_SIZE
    return [array("I", range(first + at, first + at + length)) for at in range(pool.num_blocks // AT_ONCE)]


def seal_all(pool: BlockPool, first: int) -> None:
    """Fill the pool with sealed blocks that nobody holds; what was there is evicted."""
    for tokens in texts(pool, first):
        blocks = pool.allocate(AT_ONCE, REGIONS[0].root)
        assert blocks is not None
        chain = KeyChain(REGIONS, BLOCK_SIZE)
        parent = NO_BLOCK
        data = tokens.tobytes()
        step = 4 * BLOCK_SIZE
        for number, block in enumerate(blocks):
            part = data[number * step : (number + 1) * step]
            key = chain.peek(part)
            pool.seal(block, key, chain.root, parent, part)
            chain.advance(key)
            parent = block
        pool.release(blocks[::-1])


def attach_all(pool: BlockPool) -> None:
    """Find and hold every cached prompt, and let it go."""
    for tokens in texts(pool, 0):
        table = BlockTable(pool, REGIONS)
        table.attach_prefix(tokens, len(tokens))
        table.release()


def measure_memory(num_blocks: int) -> tuple[float, float]:
    """Bytes a block of an empty pool, and of one full of sealed blocks, tokens and keys included."""
    gc.collect()
    tracemalloc.start()
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    empty = tracemalloc.get_traced_memory()[0]
    seal_all(pool, 0)
    gc.collect()
    sealed = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return empty / num_blocks, sealed / num_blocks


def main() -> None:
    """Print one line, or one JSON object, for each size."""
    parser = argparse.ArgumentParser(prog="bench.block_pool", description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[16_384, 131_072, 1_048_576])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for num_blocks in arguments.blocks:
        figures = asdict(measure(num_blocks, arguments.rounds))
        print(json.dumps(figures) if arguments.json else "  ".join(f"{k} {v}" for k, v in figures.items()), flush=True)


if __name__ == "__main__":
    main()
