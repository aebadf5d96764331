"""The command: `python -m bench.simulate --trace FILE --block-size 512 --workers 8 --cache-fraction 0.3`.

Replays the trace for each policy and prints a table, or one JSON document with `--json`. Progress goes to the standard
error. Lengths and times are those of the trace, at the scale that `--units` sets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.simulate.baselines import POLICIES
from bench.simulate.replay import FleetShape, Outcome, Replay, Say
from bench.simulate.report import Figures, document, figures
from bench.simulate.trace import Trace, read_trace
from pando.errors import ConfigError

DEFAULT_UNITS = 16
TRACES = "PANDO_TRACES"


@dataclass(frozen=True, slots=True)
class Run:
    """One policy of a comparison."""

    policy: str
    figures: Figures
    refused: int
    evictions: int


def main(argv: Sequence[str] | None = None) -> int:
    """Replay what is asked for and show it; 2 for a trace or a setting that cannot be used."""
    arguments = _parser().parse_args(argv)
    try:
        units = arguments.units or min(DEFAULT_UNITS, arguments.block_size)
        trace = read_trace(_find(arguments.trace), arguments.block_size, units, arguments.limit)
        trace = trace.spread() if arguments.spread else trace
        shape = _shape(arguments)
    except ConfigError as error:
        print(f"bench.simulate: {error}", file=sys.stderr)
        return 2
    replica = shape.replica(trace)
    if replica.num_blocks == trace.longest:
        print(f"bench.simulate: each worker gets the {trace.longest} blocks of the longest request", file=sys.stderr)
    policies = list(POLICIES) if arguments.policy == "all" else [arguments.policy]
    runs = compare(trace, shape, policies, jobs=arguments.jobs)
    if arguments.json:
        print(json.dumps(document(trace.ideal, len(trace.requests), {run.policy: run.figures for run in runs})))
    else:
        _show(trace, shape, runs)
    if arguments.plot is not None:
        from bench.simulate.plot import write_plot

        name = Path(arguments.trace).name.split(".")[0]
        title = f"{name}: {len(trace.requests):,} requests, {shape.workers} workers, cache {shape.cache_fraction:g}"
        write_plot({run.policy: run.figures for run in runs}, arguments.plot / name, title)
    return 0


def compare(trace: Trace, shape: FleetShape, policies: Sequence[str], *, jobs: int = 1) -> list[Run]:
    """The same requests under each policy. With more than one job each policy has a process of its own."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        tasks = [progress.add_task(policy, total=len(trace.requests)) for policy in policies]
        if jobs > 1:
            with ProcessPoolExecutor(jobs) as pool:
                return list(pool.map(partial(_run, trace, shape), policies))
        told = [partial(_advance, progress, task) for task in tasks]
        return [_run(trace, shape, policy, say) for policy, say in zip(policies, told, strict=True)]


def _run(trace: Trace, shape: FleetShape, policy: str, say: Say = lambda done: None) -> Run:
    outcome: Outcome = Replay(trace, shape, policy).run(say)
    refused = sum(fate.ttft_s is None for fate in outcome.fates)
    return Run(policy, figures(outcome, trace.ideal), refused, outcome.evictions)


def _advance(progress: Progress, task: object, done: int) -> None:
    progress.update(task, completed=done)  # type: ignore[arg-type]


def _find(name: str) -> Path:
    """A file, or one of that name in the folder of traces."""
    folder = os.environ.get(TRACES)
    path = Path(name)
    return Path(folder, name) if folder and not path.exists() else path


def _shape(arguments: argparse.Namespace) -> FleetShape:
    if arguments.workers < 1 or arguments.routers < 1 or arguments.cache_fraction < 0 or arguments.load <= 0:
        raise ConfigError("workers, routers and load must be positive")
    return FleetShape(
        workers=arguments.workers,
        cache_fraction=arguments.cache_fraction,
        routers=arguments.routers,
        load=arguments.load,
        step_s=arguments.step_ms / 1e3,
        batch_tokens=arguments.batch_tokens,
        event_lag_s=arguments.event_lag_ms / 1e3,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.simulate", description=__doc__)
    parser.add_argument("--trace", required=True, help=f"a file, or the name of one in the folder {TRACES}")
    parser.add_argument("--block-size", type=int, default=512, help="tokens that a hash id of the trace stands for")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--cache-fraction", type=float, default=0.3, help="all caches over the trace's distinct blocks")
    parser.add_argument("--limit", type=int, help="the first requests only")
    parser.add_argument("--spread", action="store_true", help="equal timestamps: spread evenly until the next one")
    parser.add_argument("--policy", choices=("all", *POLICIES), default="all")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--load", type=float, default=0.9, help="of the fleet, if nothing were found in a cache")
    parser.add_argument("--event-lag-ms", type=float, default=10.0, help="from a step's end to the routers' index")
    parser.add_argument("--step-ms", type=float, default=1.0, help="fixed part of a step")
    parser.add_argument("--batch-tokens", type=int, default=512, help="token budget of a step, in the trace's tokens")
    parser.add_argument("--units", type=int, default=0, help="positions that a block is simulated with")
    parser.add_argument("--jobs", type=int, default=1, help="policies replayed at the same time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a plot there, named as the trace")
    return parser


def _show(trace: Trace, shape: FleetShape, runs: Sequence[Run]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{len(trace.requests)} requests, {shape.workers} workers, cache {shape.cache_fraction:g} of "
        f"{trace.num_distinct} blocks; an endless cache would have {trace.ideal:.3f} of all prompt tokens"
    )
    table = Table("policy", "hits / ideal", "TTFT mean s", "p50 s", "p99 s", "max / mean work", "evicted", "refused")
    for run in runs:
        found = run.figures
        table.add_row(
            run.policy,
            f"{found.hit_ratio:.3f}",
            *(f"{value:.2f}" for value in (found.ttft_mean_s, found.ttft_p50_s, found.ttft_p99_s)),
            f"{found.max_over_mean_work:.2f}",
            f"{run.evictions:,}",
            f"{run.refused:,}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
