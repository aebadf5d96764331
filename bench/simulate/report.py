"""The figures of a replay, for one policy beside the others.

Knows outcomes only. `hit_ratio` is a part of what an endless cache would have had of the same requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from bench.simulate.replay import Outcome


@dataclass(frozen=True, slots=True)
class Figures:
    """What a policy made of a trace. Work is the seconds that a worker computed."""

    hit_ratio: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    max_over_mean_work: float


def figures(outcome: Outcome, ideal: float) -> Figures:
    """Of a replay whose trace has `ideal` hits for each position of a prompt."""
    ttfts = sorted(fate.ttft_s for fate in outcome.fates if fate.ttft_s is not None)
    hits = sum(fate.cached for fate in outcome.fates) / sum(fate.prompt for fate in outcome.fates)
    return Figures(
        hit_ratio=hits / ideal if ideal else 1.0,
        ttft_mean_s=mean(ttfts),
        ttft_p50_s=quantile(ttfts, 0.50),
        ttft_p99_s=quantile(ttfts, 0.99),
        max_over_mean_work=max(outcome.busy_s) / mean(outcome.busy_s),
    )


def quantile(ordered: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of them do not exceed."""
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def document(ideal: float, requests: int, found: dict[str, Figures]) -> dict[str, Any]:
    """What `--json` prints."""
    policies = {name: {key: round(value, 4) for key, value in asdict(one).items()} for name, one in found.items()}
    return {"ideal": round(ideal, 4), "requests": requests, "policies": policies}
