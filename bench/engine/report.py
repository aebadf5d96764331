"""What a comparison says: medians with their spread, what limits each column, and what is claimed, met or missed.

Knows the figures of rounds, no system. Invariant: a ratio is of two figures of one round, and nothing is left out
because it is missed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.engine.comparison import Results, Round
from bench.engine.roofline import Bound
from bench.engine.tables import markdown, number, spread

OURS = "pando"
COLUMNS = {
    "workload_tokens_per_s": ("tokens/s", 0),
    "ttft_p50_s": ("TTFT p50 s", 2),
    "ttft_p99_s": ("TTFT p99 s", 2),
    "without_tokens_per_s": ("no reuse: tokens/s", 0),
    "without_ttft_p50_s": ("no reuse: TTFT p50 s", 2),
    "without_ttft_p99_s": ("no reuse: TTFT p99 s", 2),
    "decode_tokens_per_s": ("decode batch 1", 1),
    "prefill_tokens_per_s": ("prefill 4,096", 0),
}
CORES = {"own_cores": "cores it used", "others_cores": "cores of the others", "client_cores": "cores of the client"}
LOWER_IS_BETTER = frozenset({"ttft_p50_s", "ttft_p99_s", "without_ttft_p50_s", "without_ttft_p99_s"})
IN_ITS_PLACE = {
    "workload_tokens_per_s": "without_tokens_per_s",
    "ttft_p50_s": "without_ttft_p50_s",
    "ttft_p99_s": "without_ttft_p99_s",
}
"""What counts for a peer that cannot reuse."""

ABOUT_BOUNDS = """\
Shares of what the machine's rates of the same round allow, by what every system has to compute or to read: of the
workload every request's own tokens, what is common once, and the weights once a step; of TTFT p50 one prompt alone, of
TTFT p99 all that come at once at the start. Over 100 % the bytes came from a cache, or the rates were taken when the
machine was busier."""


@dataclass(frozen=True, slots=True)
class Claim:
    """That our figure is at least `bar` times as good as that of `peer`, or of the best peer of each round."""

    column: str
    bar: float
    peer: str = ""


CLAIMS = (
    Claim("workload_tokens_per_s", 1.3, "vllm"),
    Claim("workload_tokens_per_s", 1.0),
    Claim("decode_tokens_per_s", 1.0),
    Claim("prefill_tokens_per_s", 1.0),
    Claim("ttft_p50_s", 1.0),
    Claim("ttft_p99_s", 1.0),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ratios`: one a round, over 1 where ours is better; `against`: who was held beside it in each."""

    claim: Claim
    ratios: tuple[float, ...]
    against: tuple[str, ...]

    @property
    def ratio(self) -> float | None:
        """The median."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def holds(self) -> bool | None:
        """None where there was nothing to hold it against."""
        return None if self.ratio is None else self.ratio >= self.claim.bar


def judge(claim: Claim, rounds: Sequence[Round]) -> Verdict:
    """By the median of the ratios within a round."""
    found = [one for one in (_ratio(claim, each) for each in rounds) if one is not None]
    return Verdict(claim, tuple(ratio for ratio, _ in found), tuple(name for _, name in found))


def _ratio(claim: Claim, each: Round) -> tuple[float, str] | None:
    """With the peer that makes it least."""
    ours = each.figures.get(OURS, {}).get(claim.column)
    peers = {
        name: figures.get(claim.column, figures.get(IN_ITS_PLACE.get(claim.column, "")))
        for name, figures in each.figures.items()
        if name == claim.peer or (not claim.peer and name != OURS)
    }
    there = {name: value for name, value in peers.items() if value is not None}
    if ours is None or not there:
        return None
    lower = claim.column in LOWER_IS_BETTER
    return min((value / ours if lower else ours / value, name) for name, value in there.items())


def document(results: Results, bounds: Mapping[str, Bound], about: Mapping[str, Any]) -> dict[str, Any]:
    """All of it, every round too; `about` says what was run."""
    verdicts = [judge(claim, results.rounds) for claim in CLAIMS]
    return {
        **about,
        "medians": {
            name: {
                column: statistics.median(values)
                for column in COLUMNS | CORES
                if (values := _of(results, name, column))
            }
            for name in results.names
        },
        "roofline": {
            column: {
                "limit": _limit(results, bound),
                "bounds": [bound.value(each.machine) for each in results.rounds],
                "shares": {name: _shares(results, name, column, bound) for name in results.names},
            }
            for column, bound in bounds.items()
        },
        "claims": [asdict(one) | {"ratio": one.ratio, "holds": one.holds} for one in verdicts],
        "failures": results.failures,
        "absent": results.absent,
        "rounds": [asdict(each) for each in results.rounds],
    }


def text(results: Results, bounds: Mapping[str, Bound], title: str) -> str:
    """The same as markdown."""
    parts = [title, _systems(results), _claims(results), _roofline(results, bounds), _rounds(results)]
    gone = [f"failed: {name}: {why}" for name, why in results.failures.items()]
    gone += [f"absent: {name}: {why}" for name, why in results.absent.items()]
    return "\n\n".join([*parts, *gone]) + "\n"


def _systems(results: Results) -> str:
    head = ["system", *(title for title, _ in COLUMNS.values()), *CORES.values()]
    digits = {column: places for column, (_, places) in COLUMNS.items()} | dict.fromkeys(CORES, 2)
    body = [
        [name, *(spread(_of(results, name, column), places) for column, places in digits.items())]
        for name in results.names
    ]
    return f"Medians (least to most) of rounds: {len(results.rounds)}\n\n" + markdown(head, body)


def _claims(results: Results) -> str:
    body = []
    for claim in CLAIMS:
        found = judge(claim, results.rounds)
        said = {None: "not measured", True: "met", False: "missed"}[found.holds]
        against = ", ".join(sorted(set(found.against))) or claim.peer or "best peer"
        body.append([COLUMNS[claim.column][0], against, spread(found.ratios, 2), f">= {claim.bar}", said])
    return markdown(["ours as times better", "than", "ratio within a round", "claim", ""], body)


def _roofline(results: Results, bounds: Mapping[str, Bound]) -> str:
    head = ["column", "limited by", "bound", *results.names]
    body = []
    for column, bound in bounds.items():
        title, digits = COLUMNS[column]
        values = [bound.value(each.machine) for each in results.rounds]
        shares = [_shares(results, name, column, bound) for name in results.names]
        cells = [f"{spread(one, 0, 100.0)} %" if one else "-" for one in shares]
        body.append(
            [title, _limit(results, bound), spread(values, max(digits, 3 if column in LOWER_IS_BETTER else 0)), *cells]
        )
    return f"{ABOUT_BOUNDS}\n\n{markdown(head, body)}"


def _rounds(results: Results) -> str:
    body = [
        [
            str(each.number),
            number(each.machine.matmul_gflop_s, 0),
            number(each.machine.read_gb_s, 1),
            number(each.load, 1),
            ", ".join(each.order),
        ]
        for each in results.rounds
    ]
    return markdown(["round", "GFLOP/s", "GB/s", "load before", "order"], body)


def _of(results: Results, name: str, column: str) -> list[float]:
    """A value for each round that has one."""
    found = (each.figures.get(name, {}).get(column) for each in results.rounds)
    return [value for value in found if value is not None]


def _shares(results: Results, name: str, column: str, bound: Bound) -> list[float]:
    return [
        bound.share(value, each.machine)
        for each in results.rounds
        if (value := each.figures.get(name, {}).get(column)) is not None
    ]


def _limit(results: Results, bound: Bound) -> str:
    """By most rounds."""
    return statistics.mode(bound.work.limit(each.machine) for each in results.rounds)
