"""What `bench.index` fills every index with: workers that hold chains of block keys, one chain that is asked for.

Knows no index. Invariant: a fleet is a function of its seed, so every index gets the same blocks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DEPTH = 256
CHAIN = 512
ROUNDS = 40
CALLS = 50


@dataclass(frozen=True, slots=True)
class Fleet:
    """`chains_of[worker]` are the chains of keys that a worker holds, the head of `query` first."""

    shape: str
    query: list[bytes]
    heads: list[int]
    chains_of: list[list[list[bytes]]]

    @property
    def num_blocks(self) -> int:
        """Blocks of all workers."""
        return sum(len(chain) for chains in self.chains_of for chain in chains)

    def depths(self) -> list[int]:
        """All lengths of prefix of `query` that occur."""
        return sorted(set(self.heads))


def make_fleet(shape: str, num_workers: int, num_blocks: int, seed: int = 1) -> Fleet:
    """`num_blocks` over the workers. Shape "whole": each holds all of the query; "head": all hold a quarter of it and
    two more; "spread": each another length, as far as the depth allows."""
    rng = random.Random(seed)
    query = keys(rng, DEPTH)
    heads = {
        "whole": [DEPTH] * num_workers,
        "head": [DEPTH, DEPTH * 3 // 4, *[DEPTH // 4] * (num_workers - 2)],
        "spread": [max(1, (worker + 1) * DEPTH // num_workers) for worker in range(num_workers)],
    }[shape]
    share = num_blocks // num_workers
    chains = [[query[:head], *(keys(rng, CHAIN) for _ in range((share - head) // CHAIN))] for head in heads]
    return Fleet(shape, query, heads, chains)


def keys(rng: random.Random, count: int) -> list[bytes]:
    """Random block keys."""
    blob = rng.randbytes(16 * count)
    return [blob[at : at + 16] for at in range(0, len(blob), 16)]


def best_of(call: Callable[[], Any], *, calls: int = CALLS) -> float:
    """Seconds a call, the best of several rounds: what it costs where nothing else runs."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls)
    return best
