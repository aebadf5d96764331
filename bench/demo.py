"""`pando demo`: one multi-tenant workload on a fleet with prefix reuse and on the same fleet without it, side by side.

Knows how to start fleets and how to read what a client measured. Everything it starts has ended when it returns.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.workload import Ask, Measured, Shape, make_asks, percentile, send, warm_up
from control.cluster import Cluster
from control.stack import Stack
from pando.settings import UpSettings, narrow

GOAL = 0.35

Say = Callable[[str], None]
Done = Callable[[Measured], None]


@dataclass(frozen=True, slots=True)
class Run:
    """The workload sent to one fleet; `wall_s` from its first request to its last answer."""

    reuse: bool
    measured: tuple[Measured, ...]
    wall_s: float

    def of(self, tenant: str) -> list[Measured]:
        """What one tenant saw."""
        return [m for m in self.measured if m.ask.tenant == tenant]

    def of_wave(self, wave: int) -> list[Measured]:
        """What one wave saw."""
        return [m for m in self.measured if m.ask.wave == wave]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both runs and what follows from them. TTFT is compared over all waves after the first, which is cold in both."""

    shape: Shape
    block_size: int
    shared: Run
    alone: Run

    @property
    def tenants(self) -> list[str]:
        """In order of name."""
        return sorted({m.ask.tenant for m in self.shared.measured})

    @property
    def full_block_tokens(self) -> int:
        """Tokens of the system prompt that lie in full blocks: what a warm request may find."""
        return self.shape.head_tokens // self.block_size * self.block_size

    @property
    def ttft_ratio(self) -> float:
        """Median TTFT of the later waves, with reuse over without."""
        return _later_ttft(self.shared) / _later_ttft(self.alone)

    def ttft_of_wave(self, wave: int) -> tuple[float, float]:
        """Median seconds to the first token in one wave: with reuse, without."""
        shared, alone = (statistics.median(m.ttft_s for m in run.of_wave(wave)) for run in (self.shared, self.alone))
        return shared, alone

    @property
    def all_blocks_hit(self) -> bool:
        """Whether every request of the second wave found all full blocks of its system prompt.

        More than a part of the block behind them would be somebody else's.
        """
        least = self.full_block_tokens
        return all(least <= m.cached_tokens < least + self.block_size for m in self.shared.of_wave(1))

    @property
    def equal_answers(self) -> int:
        """Requests whose greedy answer is the same with reuse and without."""
        other = {m.ask.number: m.answer for m in self.alone.measured}
        return sum(m.answer == other[m.ask.number] for m in self.shared.measured)

    @property
    def ok(self) -> bool:
        """Whether sharing did what it promises."""
        return self.all_blocks_hit and self.ttft_ratio <= GOAL


def compare(settings: UpSettings, shape: Shape, say: Say, progress: Callable[[str, int], Any]) -> Comparison:
    """Start a fleet with prefix reuse, send the workload, end it; the same without reuse.

    `progress(title, total)` is a context manager that gives a function to call with each answer. Call from the main
    thread.
    """
    cluster = Cluster(namespace=settings.cluster, slots=settings.workers)
    try:
        say("starting Ray")
        cluster.start()
        asks: list[Ask] = []
        runs = []
        for reuse in (True, False):
            with _fleet(settings, reuse, cluster, say) as target:
                asks = asks or asyncio.run(make_asks(target, shape))
                asyncio.run(warm_up(target, 2 * settings.workers))
                title = "with prefix reuse" if reuse else "without reuse"
                with progress(title, len(asks)) as done:
                    runs.append(_run(target, asks, shape, reuse, done))
        return Comparison(shape, settings.block_size, *runs)
    finally:
        cluster.stop()


def document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as `pando demo --json` prints it."""
    return {
        "workload": {
            "tenants": comparison.shape.tenants,
            "requests": comparison.shape.requests,
            "system_prompt_tokens": comparison.shape.head_tokens,
            "max_tokens": comparison.shape.max_tokens,
            "waves": list(comparison.shape.waves),
        },
        "with_reuse": _run_document(comparison.shared, comparison.tenants),
        "without_reuse": _run_document(comparison.alone, comparison.tenants),
        "second_wave": {
            "full_block_tokens": comparison.full_block_tokens,
            "cached_tokens": sorted({m.cached_tokens for m in comparison.shared.of_wave(1)}),
            "all_blocks_hit": comparison.all_blocks_hit,
        },
        "waves": [_wave_document(comparison, wave) for wave in range(len(comparison.shape.waves))],
        "ttft_ratio": round(comparison.ttft_ratio, 4),
        "ttft_ratio_goal": GOAL,
        "equal_answers": comparison.equal_answers,
        "ok": comparison.ok,
    }


def summary(comparison: Comparison) -> list[str]:
    """What the table means, a sentence a line."""
    shared, alone, shape = comparison.shared, comparison.alone, comparison.shape
    computed, all_prompt = _computed(shared), _computed(alone)
    second = sorted({m.cached_tokens for m in shared.of_wave(1)})
    found = str(second[0]) if len(second) == 1 else f"{second[0]} to {second[-1]}"
    verdict = "every full block" if comparison.all_blocks_hit else "NOT every full block"
    return [
        f"TTFT p50 after the first wave: {_later_ttft(shared) * 1e3:.0f} ms with reuse, "
        f"{_later_ttft(alone) * 1e3:.0f} ms without: {comparison.ttft_ratio:.2f}x (goal {GOAL}x).",
        "The same by wave, all requests of a wave at once: "
        + "; ".join(_wave_line(comparison, wave) for wave in range(len(shape.waves)))
        + ".",
        f"Second wave: {found} cached tokens of {shape.head_tokens} shared: {verdict} of each tenant's system prompt.",
        f"Prompt tokens computed: {computed:,} against {all_prompt:,} ({computed / all_prompt:.2f}x). Whole run: "
        f"{shared.wall_s:.1f} s against {alone.wall_s:.1f} s.",
        f"Greedy answers equal in both runs: {comparison.equal_answers} of {len(shared.measured)}.",
    ]


def table(comparison: Comparison) -> Any:
    """A row a tenant, both runs side by side."""
    from rich import box
    from rich.table import Table

    made = Table(
        title=f"{comparison.shape.requests} requests, each pair: with reuse | without",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    made.add_column("tenant", no_wrap=True)
    for name in ("requests", "prompt tokens", "cached", "TTFT p50 ms", "TTFT p99 ms", "tokens/s", "worker spread"):
        made.add_column(name, justify="right", no_wrap=True)
    for tenant in [*comparison.tenants, ""]:
        made.add_row(tenant or "all", *_cells(comparison, tenant), style="" if tenant else "bold")
    return made


@contextmanager
def _fleet(settings: UpSettings, reuse: bool, cluster: Cluster, say: Say) -> Iterator[str]:
    word = "on" if reuse else "off"
    mine = narrow(UpSettings, settings, cluster=f"{settings.cluster}-{word}", prefix_cache=word)
    stack = Stack(mine, say, cluster=cluster)
    try:
        yield stack.start().grpc
    finally:
        stack.stop()


def _run(target: str, asks: Sequence[Ask], shape: Shape, reuse: bool, done: Done) -> Run:
    began = time.perf_counter()
    measured = asyncio.run(send(target, asks, shape, done))
    return Run(reuse, tuple(measured), time.perf_counter() - began)


def _wave_line(comparison: Comparison, wave: int) -> str:
    shared, alone = comparison.ttft_of_wave(wave)
    name = f"{comparison.shape.waves[wave]}{' cold' if wave == 0 else ''}"
    return f"{name}: {shared * 1e3:.0f} | {alone * 1e3:.0f} ms"


def _wave_document(comparison: Comparison, wave: int) -> dict[str, Any]:
    shared, alone = comparison.ttft_of_wave(wave)
    return {
        "requests": comparison.shape.waves[wave],
        "ttft_p50_ms": round(shared * 1e3, 1),
        "ttft_p50_ms_without_reuse": round(alone * 1e3, 1),
        "ratio": round(shared / alone, 4),
    }


def _later_ttft(run: Run) -> float:
    return statistics.median(m.ttft_s for m in run.measured if m.ask.wave > 0)


def _computed(run: Run) -> int:
    return sum(m.prompt_tokens - m.cached_tokens for m in run.measured)


def _figures(run: Run, tenant: str) -> dict[str, Any]:
    """Of one tenant, or of all for an empty name."""
    seen = run.of(tenant) if tenant else list(run.measured)
    ttft = [m.ttft_s for m in seen]
    return {
        "requests": len(seen),
        "prompt_tokens": sum(m.prompt_tokens for m in seen),
        "cached_tokens": sum(m.cached_tokens for m in seen),
        "ttft_p50_ms": round(percentile(ttft, 0.5) * 1e3, 1),
        "ttft_p99_ms": round(percentile(ttft, 0.99) * 1e3, 1),
        "tokens_per_s": round(sum(len(m.answer) for m in seen) / run.wall_s, 1),
        "worker_spread": dict(sorted(Counter(m.worker for m in seen).items())),
    }


def _run_document(run: Run, tenants: Sequence[str]) -> dict[str, Any]:
    later = [m.ttft_s for m in run.measured if m.ask.wave > 0]
    return {
        "wall_s": round(run.wall_s, 3),
        "prompt_tokens_computed": _computed(run),
        "ttft_p50_later_waves_ms": round(statistics.median(later) * 1e3, 1),
        "total": _figures(run, ""),
        "tenants": {tenant: _figures(run, tenant) for tenant in tenants},
    }


def _cells(comparison: Comparison, tenant: str) -> list[str]:
    workers = sorted({m.worker for run in (comparison.shared, comparison.alone) for m in run.measured})
    with_reuse, without = _figures(comparison.shared, tenant), _figures(comparison.alone, tenant)

    def pair(name: str) -> str:
        return f"{with_reuse[name]:,.0f} | {without[name]:,.0f}"

    def spread(figures: dict[str, Any]) -> str:
        return "/".join(str(figures["worker_spread"].get(worker, 0)) for worker in workers)

    return [
        str(with_reuse["requests"]),
        f"{with_reuse['prompt_tokens']:,}",
        *(pair(name) for name in ("cached_tokens", "ttft_p50_ms", "ttft_p99_ms", "tokens_per_s")),
        f"{spread(with_reuse)} | {spread(without)}",
    ]
