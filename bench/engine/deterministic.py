"""What deterministic mode costs: two engines of one model, with and without it, measured in turns.

Knows engines alone. Invariant: both do each piece of work the one right after the other, and who is first changes from
round to round; a rate is that of the fastest round, the one that was disturbed least.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from bench.engine.alone import DECODE_CONTEXT, OneEngine, decode_steps, one_engine, prefill_rate
from pando.settings import WorkerSettings

PREFILL_TOKENS = 1024
DECODE_STEPS = 16
BATCHES = (1, 16)
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens a second of one kind of work, without the mode and with it."""

    work: str
    off: float
    on: float

    @property
    def ratio(self) -> float:
        return self.on / self.off


def measure_cost(
    settings: WorkerSettings,
    *,
    batches: Sequence[int] = BATCHES,
    prefill_tokens: int = PREFILL_TOKENS,
    rounds: int = ROUNDS,
) -> list[Cost]:
    """Prefill of one prompt, then decoding at each batch size."""
    room = max(max(batches) * (DECODE_CONTEXT + DECODE_STEPS + settings.block_size), prefill_tokens + 64)
    blocks = -(-room // settings.block_size) + len(batches)
    both = replace(settings, device_blocks=blocks, max_sequences=max(batches))
    works: dict[str, Callable[[OneEngine, int], float]] = {
        f"prefill of {prefill_tokens:,}": lambda engine, number: prefill_rate(engine, prefill_tokens, number)
    }
    works |= {f"decode, batch {batch}": partial(_decode_rate, batch) for batch in batches}
    rates: dict[tuple[str, str], float] = defaultdict(float)
    with ExitStack() as stack:
        engines = [(mode, stack.enter_context(one_engine(replace(both, deterministic=mode)))) for mode in ("off", "on")]
        for number, (work, rate) in product(range(rounds), works.items()):
            for mode, engine in engines if number % 2 else reversed(engines):
                rates[work, mode] = max(rates[work, mode], rate(engine, number))
    return [Cost(work, rates[work, "off"], rates[work, "on"]) for work in works]


def _decode_rate(batch: int, engine: OneEngine, _number: int) -> float:
    steps = decode_steps(engine, batch, DECODE_CONTEXT, DECODE_STEPS)
    return batch / statistics.median(step.wall_s for step in steps)
