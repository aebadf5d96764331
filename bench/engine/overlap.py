"""What overlap of host and device is worth: decodes in lockstep and with the next step launched early, in turns.

Knows one runner behind two engines, of which one works at a time. Invariant: ratios are of rounds side by side.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.engine.alone import DECODE_CONTEXT, OneEngine, Step, decode_steps
from bench.engine.scenario import random_ids
from pando.settings import WorkerSettings
from worker.model_runner import load_model_runner
from worker.runner import Runner
from worker.simulated_runner import load_simulated_runner

STEPS = 64


@dataclass(frozen=True, slots=True)
class OverlapFigures:
    """Medians over rounds. `lockstep_us` and `overlap_us`: a whole step; `host_us`: of it outside the runner, in
    lockstep; `ratio`: tokens a second with overlap over those without; `ttft_ratio`: the same of a first token's time,
    of a prompt that comes to an idle engine."""

    batch: int
    lockstep_us: float
    overlap_us: float
    host_us: float
    ratio: float
    ttft_ratio: float

    @property
    def hidden(self) -> float:
        """Share of the host's time that is seen no more."""
        return (self.lockstep_us - self.overlap_us) / self.host_us


def measure_overlap(settings: WorkerSettings, batches: Sequence[int], rounds: int) -> list[OverlapFigures]:
    """Decode at each batch size, both ways in each round; a simulated runner's device takes no CPU from the host."""
    blocks = -(-max(batches) * (DECODE_CONTEXT + STEPS + settings.block_size) // settings.block_size)
    settings = replace(settings, device_blocks=blocks, max_sequences=max(batches))
    load: Callable[[WorkerSettings], Runner] = load_model_runner
    if settings.runner == "simulated":
        load = load_simulated_runner
    runner = load(settings)
    try:
        ways = [OneEngine(replace(settings, overlap=overlap), runner) for overlap in ("off", "on")]
        for engine in ways:
            _first_token_s(engine)
        return [_measure(ways, batch, rounds) for batch in batches]
    finally:
        runner.close()


def _measure(ways: Sequence[OneEngine], batch: int, rounds: int) -> OverlapFigures:
    steps: list[list[float]] = [[], []]
    firsts: list[list[float]] = [[], []]
    host: list[float] = []
    for number in range(rounds):
        for at in (0, 1) if number % 2 else (1, 0):
            firsts[at].append(_first_token_s(ways[at]))
            decodes = decode_steps(ways[at], batch, DECODE_CONTEXT, STEPS)
            steps[at].append(_wall_us(decodes))
            if not at:
                host.append(1e6 * statistics.median(step.wall_s - step.run_s for step in decodes))
    return OverlapFigures(
        batch=batch,
        lockstep_us=statistics.median(steps[0]),
        overlap_us=statistics.median(steps[1]),
        host_us=statistics.median(host),
        ratio=_ratio(steps[0], steps[1]),
        ttft_ratio=_ratio(firsts[1], firsts[0]),
    )


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def _wall_us(steps: Sequence[Step]) -> float:
    return 1e6 * statistics.median(step.wall_s for step in steps)


def _first_token_s(engine: OneEngine) -> float:
    rng = random.Random("first token")
    engine.submit(random_ids(rng, DECODE_CONTEXT, engine.runner.spec.vocab_size), 2)
    first, *_ = engine.run()
    return first.wall_s
