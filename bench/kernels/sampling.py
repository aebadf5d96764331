"""Drawing tokens, beside torch's way with a sort: top-k and top-p over many rows of a large vocabulary.

Invariant: before anything is timed, the kernel's tokens are those of its twin on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bench.kernels.timing import Roofline, graph_microseconds
from kernels import device, reference
from kernels.sampling import Draws, plan_draws

ROWS, VOCAB = 128, 131_072
GOAL_US = 100.0


@dataclass(frozen=True, slots=True)
class Way:
    """One setting of the filters, and the standard deviation of the logits: how many tokens they leave."""

    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    spread: float = 3.0


WAYS = (
    Way("S", top_k=50, top_p=0.9),
    Way("S greedy", temperature=0.0),
    Way("S plain"),
    Way("S min-p", min_p=0.05),
    Way("S top-p", top_p=0.9, spread=8.0),
    Way("S flat", top_p=0.9, spread=1.0),
)


@dataclass(frozen=True, slots=True)
class SamplingFigure:
    """Microseconds of all rows; `floor` is reading them once. `differing`: tokens that are not the twin's."""

    name: str
    us: float
    floor: float
    torch_us: float
    differing: int


def time_sampling(roofline: Roofline, way: Way, rows: int = ROWS, vocab: int = VOCAB) -> SamplingFigure:
    logits = torch.randn(rows, vocab, device="cuda") * way.spread
    draws = draws_of(way, rows, logits.device)
    expected = reference.sample(logits, draws)
    differing = int((device.sample(logits, draws) != expected).sum())
    uniform = torch.rand(rows, 1, device="cuda")
    return SamplingFigure(
        name=way.name,
        us=graph_microseconds(lambda _: device.sample(logits, draws), 1),
        floor=roofline.floor(logits.numel() * logits.itemsize, 0),
        torch_us=graph_microseconds(lambda _: by_sorting(logits, way, uniform), 1),
        differing=differing,
    )


def draws_of(way: Way, rows: int, place: torch.device) -> Draws:
    ways = np.tile(np.array([way.temperature, way.top_k, way.top_p, way.min_p]), (rows, 1))
    keys = np.stack((np.arange(rows), np.full(rows, 1000)), axis=1)
    return plan_draws(ways, keys, (), place)


def by_sorting(logits: torch.Tensor, way: Way, uniform: torch.Tensor) -> torch.Tensor:
    """What torch's own operations take for the same filters, in float32."""
    if not way.temperature:
        return logits.argmax(-1)
    scaled, order = torch.sort(logits / way.temperature, dim=-1, descending=True)
    if way.top_k:
        scaled[:, way.top_k :] = -torch.inf
    weights = torch.softmax(scaled, dim=-1)
    running = torch.cumsum(weights, dim=-1)
    keep = (running - weights < way.top_p) & (weights >= way.min_p * weights[:, :1])
    running = torch.cumsum(weights * keep, dim=-1)
    place = torch.searchsorted(running, uniform * running[:, -1:], right=True).clamp_(max=order.shape[1] - 1)
    return order.gather(1, place)[:, 0]


def print_sampling(roofline: Roofline, show: Callable[[str], None] = print) -> list[SamplingFigure]:
    show(f"{'drawing':10}{'us':>9}{'of a pass':>10}{'goal us':>9}{'torch us':>10}{'differing':>11}")
    found = []
    for way in WAYS:
        figure = time_sampling(roofline, way)
        goal = f"{GOAL_US:9.0f}" if way.name == "S" else f"{'-':>9}"
        show(
            f"{figure.name:10}{figure.us:9.1f}{figure.us / figure.floor:10.2f}{goal}{figure.torch_us:10.1f}"
            f"{figure.differing:11}"
        )
        found.append(figure)
    return found
