"""One token for each row of logits, as each row's sampling parameters say.

Knows rows; nothing of requests. Invariant: a draw is a function of the row's logits, its parameters and (seed,
absolute position), so it is the same alone, in any batch, and on any worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import kernels
from worker.batch import SamplingParams

_SEED_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits needs: `position` is the absolute position of the token to choose."""

    params: SamplingParams
    position: int
    banned_token_ids: tuple[int, ...] = ()


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token id for each row of `logits[len(draws), vocab_size]` (float32; changed where tokens are banned)."""
    _ban(logits, draws)
    temperature = np.array([draw.params.temperature for draw in draws])
    if not temperature.any():
        return _greedy(logits).tolist()
    chosen = np.empty(len(draws), dtype=np.int64)
    filtered = np.array([_is_filtered(draw.params) for draw in draws])
    random = temperature > 0
    for rows, choice in (
        (~random, lambda part, _: _greedy(part)),
        (random & ~filtered, lambda part, of: kernels.sample(part, _uniform(part, of), _temperature(part, of))),
        (random & filtered, _sample_filtered),
    ):
        index = rows.nonzero()[0]
        if len(index):
            part = logits if len(index) == len(draws) else logits[torch.from_numpy(index).to(logits.device)]
            chosen[index] = choice(part, [draws[row] for row in index.tolist()]).cpu().numpy()
    return chosen.tolist()


def _ban(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    pairs = [(row, token) for row, draw in enumerate(draws) for token in draw.banned_token_ids]
    if pairs:
        index = torch.tensor(pairs, device=logits.device)
        logits[index[:, 0], index[:, 1]] = -torch.inf


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


def _uniform(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    seeds = np.array([draw.params.seed & _SEED_BITS for draw in draws], dtype=np.uint64).view(np.int64)
    positions = np.array([draw.position for draw in draws], dtype=np.int64)
    counters = torch.from_numpy(np.stack((seeds, positions))).to(logits.device)
    return kernels.counter_uniform(counters[0], counters[1])


def _temperature(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    return torch.tensor([draw.params.temperature for draw in draws], dtype=torch.float64, device=logits.device)


def _sample_filtered(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    filters = torch.tensor(
        [(draw.params.top_k, draw.params.top_p, draw.params.min_p) for draw in draws],
        dtype=torch.float64,
        device=logits.device,
    )
    return kernels.sample(
        logits,
        _uniform(logits, draws),
        _temperature(logits, draws),
        top_k=filters[:, 0].long(),
        top_p=filters[:, 1],
        min_p=filters[:, 2],
    )
