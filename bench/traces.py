"""Traces made up by rule, in the Mooncake format: `python -m bench.traces NAME --out FILE`.

NAME is a file of `bench/scenarios` or a path; `.zst` is compressed. Equal scenarios give equal traces. Invariant: two
requests have a hash id in common exactly where all their tokens up to there are the same.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from pando.errors import ConfigError

SCENARIOS = Path(__file__).with_name("scenarios")

Run = tuple[int, int]
"""A run of tokens: whose, and how many from its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is made up. Lengths are tokens; those named `mean_` are drawn, from half to one and a half of the mean.

    Every prompt begins with the `head` that all share, then its tenant's. Tenants are drawn by a Zipf law of exponent
    `zipf`. A session has `turns`, each of `fan` requests at once that share all but their last `mean_turn` tokens.
    """

    requests: int
    sessions_per_s: float
    block_size: int = 512
    seed: int = 0
    head: int = 0
    tenants: int = 1
    tenant_head: int = 0
    zipf: float = 1.0
    turns: int = 1
    fan: int = 1
    mean_turn: int = 512
    mean_answer: int = 256
    mean_pause_s: float = 10.0


def scenarios() -> list[Path]:
    """The files that traces are made from, by name; the folder has others, of other benchmarks."""
    names = {one.name for one in fields(Scenario)}
    paths = sorted(SCENARIOS.glob("*.toml"))
    return [path for path in paths if tomllib.loads(path.read_text("utf-8")).keys() <= names]


def read_scenario(name: str) -> Scenario:
    """A scenario by its name or path; raises `ConfigError` for what is none."""
    path = Path(name)
    path = path if path.suffix == ".toml" else SCENARIOS / f"{name}.toml"
    try:
        return Scenario(**tomllib.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        known = ", ".join(one.stem for one in scenarios())
        raise ConfigError(f"{name} is no scenario ({error}); there are {known}") from error


def generate(scenario: Scenario) -> Iterator[dict[str, Any]]:
    """The rows of the trace, in order of time."""
    rng = random.Random(scenario.seed)
    chains = _Chains(scenario.block_size, first_run=1 + scenario.tenants)
    weights = list(accumulate(1.0 / rank**scenario.zipf for rank in range(1, scenario.tenants + 1)))
    turns: list[_Turn] = []
    session_at = 0.0
    number = count()
    left = scenario.requests
    while left:
        if not turns or session_at <= turns[0].at:
            tenant = rng.choices(range(scenario.tenants), cum_weights=weights)[0]
            begin = ((0, scenario.head), (1 + tenant, scenario.tenant_head))
            heapq.heappush(turns, _Turn(session_at, next(number), begin, scenario.turns))
            session_at += rng.expovariate(scenario.sessions_per_s)
            continue
        turn = heapq.heappop(turns)
        for _ in range(min(scenario.fan, left)):
            runs = (*turn.runs, (chains.new_run(), _around(rng, scenario.mean_turn)))
            answer = _around(rng, scenario.mean_answer)
            yield _row(turn.at, runs, answer, chains)
            left -= 1
        if turn.left > 1:
            then = turn.at + rng.expovariate(1.0 / scenario.mean_pause_s)
            heapq.heappush(turns, _Turn(then, next(number), (*runs, (chains.new_run(), answer)), turn.left - 1))


def write_trace(rows: Iterator[dict[str, Any]], path: Path) -> int:
    """Write rows as lines; how many."""
    lines = [json.dumps(row) + "\n" for row in rows]
    data = "".join(lines).encode()
    if path.suffix == ".zst":
        import zstandard

        data = zstandard.ZstdCompressor(level=9).compress(data)
    path.write_bytes(data)
    return len(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the trace that is asked for; 2 for one that is none."""
    parser = argparse.ArgumentParser(prog="bench.traces", description=__doc__)
    parser.add_argument("name", help="of a scenario, or the path of one")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        scenario = read_scenario(arguments.name)
    except ConfigError as error:
        print(f"bench.traces: {error}", file=sys.stderr)
        return 2
    print(f"{write_trace(generate(scenario), arguments.out)} requests, block size {scenario.block_size}")
    return 0


@dataclass(frozen=True, slots=True, order=True)
class _Turn:
    """The next requests of a session, and how many turns it has left with them."""

    at: float
    number: int
    runs: tuple[Run, ...]
    left: int


class _Chains:
    """Names for runs of tokens, and for blocks by all that lies before their end."""

    def __init__(self, block_size: int, first_run: int) -> None:
        self._block_size = block_size
        self._runs = count(first_run)
        self._ids: dict[tuple[int, tuple[tuple[int, int, int], ...]], int] = {}

    def new_run(self) -> int:
        """A run that nobody has yet."""
        return next(self._runs)

    def hash_ids(self, runs: Sequence[Run]) -> list[int]:
        """One id for each block of a prompt made of these runs, the last one full or not."""
        hash_ids: list[int] = []
        parent = -1
        for content in self._blocks(runs):
            parent = self._ids.setdefault((parent, content), len(self._ids))
            hash_ids.append(parent)
        return hash_ids

    def _blocks(self, runs: Sequence[Run]) -> Iterator[tuple[tuple[int, int, int], ...]]:
        """What each block is made of: parts (run, first, end)."""
        content: list[tuple[int, int, int]] = []
        room = self._block_size
        for run, length in runs:
            first = 0
            while first < length:
                end = min(length, first + room)
                content.append((run, first, end))
                room -= end - first
                first = end
                if not room:
                    yield tuple(content)
                    content, room = [], self._block_size
        if content:
            yield tuple(content)


def _row(at: float, runs: Sequence[Run], answer: int, chains: _Chains) -> dict[str, Any]:
    return {
        "timestamp": round(at * 1e3),
        "input_length": sum(length for _, length in runs),
        "output_length": answer,
        "hash_ids": chains.hash_ids(runs),
    }


def _around(rng: random.Random, mean: int) -> int:
    return max(1, round(mean * rng.uniform(0.5, 1.5)))


if __name__ == "__main__":
    sys.exit(main())
