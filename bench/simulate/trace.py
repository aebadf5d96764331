"""Request traces in the Mooncake format: one JSON object a line, `.zst` or plain, cut to the scale of a simulation.

Knows nothing of workers. Invariant: equal hash ids behind equal ids give equal token ids, different ones give token ids
that differ in the first position, so that a shared prefix in the trace is one in the store and nothing else is.
"""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from pando.errors import ConfigError

PRIVATE = 1 << 31
"""Token ids from here on stand for positions that no hash id names."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line. `arrival_s` counts from the first request of the trace; lengths are in positions of the simulation.

    `session` is empty in traces that name none.
    """

    number: int
    arrival_s: float
    prompt: int
    answer: int
    hash_ids: tuple[int, ...]
    session: str


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival. A block of the trace has `units` positions, each for `scale` tokens of the trace.

    `head`: leading blocks that all requests have in common.
    """

    requests: tuple[TraceRequest, ...]
    block_size: int
    units: int
    head: int

    @property
    def scale(self) -> float:
        """Tokens of the trace that one position stands for."""
        return self.block_size / self.units

    @property
    def prompt(self) -> int:
        """Positions of all prompts."""
        return sum(request.prompt for request in self.requests)

    @property
    def span_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s

    @property
    def num_distinct(self) -> int:
        """Different blocks."""
        return len({hash_id for request in self.requests for hash_id in request.hash_ids})

    @property
    def longest(self) -> int:
        """Blocks that the longest request fills with its answer."""
        return max(-(-(request.prompt + request.answer) // self.units) for request in self.requests)

    @property
    def ideal(self) -> float:
        """Part of all prompt positions that an endless cache of all workers together would have."""
        seen: set[int] = set()
        hits = 0
        for request in self.requests:
            known = next((at for at, one in enumerate(request.hash_ids) if one not in seen), len(request.hash_ids))
            hits += min(known * self.units, request.prompt - 1)
            seen.update(request.hash_ids)
        return hits / self.prompt

    def spread(self) -> Trace:
        """The same with requests of one timestamp spread evenly until the next: a trace's clock may tick in seconds."""
        ticks = [list(tick) for _, tick in groupby(self.requests, key=lambda request: request.arrival_s)]
        spread: list[TraceRequest] = []
        for tick, following in zip(ticks, [*ticks[1:], ticks[-1]], strict=True):
            step_s = (following[0].arrival_s - tick[0].arrival_s) / len(tick)
            spread += (replace(one, arrival_s=one.arrival_s + at * step_s) for at, one in enumerate(tick))
        return replace(self, requests=tuple(spread))

    def tokens(self, request: TraceRequest) -> array[int]:
        """The prompt's token ids: those of a block follow from its hash id."""
        units = self.units
        token_ids = array("I")
        for hash_id in request.hash_ids:
            token_ids.extend(range(hash_id * units, (hash_id + 1) * units))
        del token_ids[request.prompt :]
        token_ids.extend([PRIVATE + request.number] * (request.prompt - len(token_ids)))
        return token_ids


def read_trace(path: Path, block_size: int, units: int, limit: int | None = None) -> Trace:
    """The first `limit` requests of a file. Raises `ConfigError` for a file that is no trace."""
    if block_size < 1 or not 1 <= units <= block_size or block_size % units:
        raise ConfigError("the positions of a block must divide its tokens")
    try:
        rows = [json.loads(line) for line in islice(_lines(path), limit) if line.strip()]
        rows.sort(key=lambda row: row["timestamp"])
        requests = tuple(
            _request(number, row, rows[0]["timestamp"], block_size, units) for number, row in enumerate(rows)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no trace: {error}") from error
    if len(requests) < 2 or requests[-1].arrival_s <= 0:
        raise ConfigError(f"{path} has fewer than two moments of arrival")
    return Trace(requests, block_size, units, _common_head([request.hash_ids for request in requests]))


def _lines(path: Path) -> Iterator[str]:
    if path.suffix != ".zst":
        with path.open(encoding="utf-8") as plain:
            yield from plain
        return
    import zstandard

    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as data:
        yield from io.TextIOWrapper(data, encoding="utf-8")


def _request(number: int, row: dict[str, Any], first_ms: float, block_size: int, units: int) -> TraceRequest:
    prompt, answer = int(row["input_length"]), int(row["output_length"])
    full, rest = divmod(prompt, block_size)
    hash_ids = tuple(map(int, row["hash_ids"]))
    if prompt < 1 or any(not 0 <= one < PRIVATE // units for one in hash_ids):
        raise ValueError(f"request {number} has an empty prompt or a hash id out of range")
    return TraceRequest(
        number=number,
        arrival_s=(row["timestamp"] - first_ms) / 1e3,
        prompt=full * units + -(-rest * units // block_size),
        answer=max(1, -(-answer * units // block_size)),
        hash_ids=hash_ids[: -(-prompt // block_size)],
        session=str(row.get("session", "")),
    )


def _common_head(chains: Sequence[tuple[int, ...]]) -> int:
    low, high = min(chains), max(chains)
    return next((at for at, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
