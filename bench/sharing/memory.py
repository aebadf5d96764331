"""What the block store's bookkeeping costs, in bytes and microseconds a block, as pools grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from bench.block_pool import measure
from bench.sharing.finding import Claim, Finding


@dataclass(frozen=True, slots=True)
class MemoryShape:
    """Pools of these numbers of blocks, each measured in so many rounds."""

    blocks: tuple[int, ...] = (1 << 10, 1 << 15, 1 << 20)
    rounds: int = 2


def run(shape: MemoryShape, say: Callable[[str], None]) -> Finding:
    """All sizes, the smallest first."""
    found = []
    for num_blocks in shape.blocks:
        say(f"{num_blocks} blocks")
        found.append(measure(num_blocks, shape.rounds))
    largest = found[-1]
    return Finding(
        "memory",
        f"pools of {', '.join(map(str, shape.blocks))} blocks, best of {shape.rounds} rounds",
        tuple(asdict(one) for one in found),
        (
            Claim(
                f"allocate + free at {largest.num_blocks} blocks, us a block", largest.allocate_and_free_us, "<=", 2.0
            ),
            Claim(
                "the same, largest pool / smallest",
                round(largest.allocate_and_free_us / found[0].allocate_and_free_us, 2),
                "<=",
                2.0,
            ),
        ),
    )
