"""Sends a workload to one system and times it as its client sees it; what comes of that as numbers.

Knows a system by one face: a stream of how many tokens came. Invariant: an answer of another length than asked for is
an error, so that no system gains by answering less.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.engine.scenario import DECODE_PROMPT, DECODE_TOKENS, PREFILL_TOKENS, Ask, MultiTenant, make_asks, single_ask
from bench.workload import percentile

Figures = dict[str, float]
"""Of one system in one round, by name; what it cannot do is not there."""


class System(Protocol):
    """Something that serves the model. `reuse` says whether it may use what it computed before."""

    def stream(self, ask: Ask, *, reuse: bool) -> AsyncGenerator[int, None]:
        """The number of new tokens, whenever some came."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered request; seconds of one clock."""

    sent_at: float
    first_at: float
    ended_at: float
    tokens: int

    @property
    def ttft_s(self) -> float:
        """From sent to the first token."""
        return self.first_at - self.sent_at


async def ask_one(system: System, ask: Ask, *, reuse: bool) -> Sample:
    """Send it and wait for its end; `RuntimeError` if the answer is shorter or longer than asked for."""
    sent_at = time.perf_counter()
    first_at = 0.0
    tokens = 0
    async for count in system.stream(ask, reuse=reuse):
        if count and not tokens:
            first_at = time.perf_counter()
        tokens += count
    if tokens != ask.output_tokens:
        raise RuntimeError(f"asked for {ask.output_tokens} tokens and got {tokens}")
    return Sample(sent_at, first_at, time.perf_counter(), tokens)


async def ask_all(system: System, asks: Sequence[Ask], *, concurrency: int, reuse: bool) -> list[Sample]:
    """All of them in order, so many open at once; the first failure takes back those that are open."""
    free = asyncio.Semaphore(concurrency)

    async def one(ask: Ask) -> Sample:
        async with free:
            return await ask_one(system, ask, reuse=reuse)

    tasks = [asyncio.ensure_future(one(ask)) for ask in asks]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def workload_figures(samples: Sequence[Sample], *, reuse: bool) -> Figures:
    """Output tokens over the time from the first request to the last answer; TTFT by nearest rank."""
    wall_s = max(one.ended_at for one in samples) - min(one.sent_at for one in samples)
    ttft = [one.ttft_s for one in samples]
    rate, prefix = ("workload_tokens_per_s", "") if reuse else ("without_tokens_per_s", "without_")
    return {
        rate: sum(one.tokens for one in samples) / wall_s,
        f"{prefix}ttft_p50_s": percentile(ttft, 0.5),
        f"{prefix}ttft_p99_s": percentile(ttft, 0.99),
    }


def decode_rate(sample: Sample) -> float:
    """Tokens a second after the first."""
    return (sample.tokens - 1) / (sample.ended_at - sample.first_at)


async def measure_system(system: System, vocab_size: int, scenario: MultiTenant, number: int, into: Figures) -> None:
    """Round `number`: the workload with reuse and without, then one request at a time. Figures are added as they
    come."""
    for reuse in (True, False):
        asks = make_asks(scenario, vocab_size, number)
        samples = await ask_all(system, asks, concurrency=scenario.concurrency, reuse=reuse)
        into |= workload_figures(samples, reuse=reuse)
    decode = await ask_one(system, single_ask("decode", DECODE_PROMPT, DECODE_TOKENS, vocab_size, number), reuse=False)
    into["decode_tokens_per_s"] = decode_rate(decode)
    prefill = await ask_one(system, single_ask("prefill", PREFILL_TOKENS, 1, vocab_size, number), reuse=False)
    into["prefill_tokens_per_s"] = PREFILL_TOKENS / prefill.ttft_s
