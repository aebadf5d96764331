"""One token for each row of logits, as each row's sampling parameters say.

Knows rows; nothing of requests. Invariant: a draw is a function of the row's logits, its parameters and (seed,
absolute position), so it is the same alone, in any batch, and on any worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import kernels
from worker.batch import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits needs: `position` is the absolute position of the token to choose."""

    params: SamplingParams
    position: int
    banned_token_ids: tuple[int, ...] = ()


def is_greedy(draws: Sequence[Draw]) -> bool:
    """Whether the most likely token is drawn of every row."""
    return not any(draw.params.temperature or draw.banned_token_ids for draw in draws)


def start(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """A token id for each row of `logits[len(draws), vocab_size]` (float32; changed where tokens are banned):
    `[len(draws)]` int64, where the logits are. Does not wait for the device."""
    if is_greedy(draws):
        return kernels.argmax(logits)
    params = [draw.params for draw in draws]
    ways = [(way.temperature, way.top_k, way.top_p, way.min_p) for way in params]
    keys = [(draw.params.seed, draw.position) for draw in draws]
    banned = [(row, token) for row, draw in enumerate(draws) for token in draw.banned_token_ids]
    return kernels.sample(logits, kernels.plan_draws(ways, keys, banned, logits.device))
