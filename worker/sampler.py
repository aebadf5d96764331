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
    return start(logits, draws).tolist()


def start(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """As `choose`, where the logits are: `[len(draws)]` int64. Does not wait for the device."""
    params = [draw.params for draw in draws]
    ways = np.array([(way.temperature, way.top_k, way.top_p, way.min_p) for way in params], dtype=np.float64)
    seeds = np.array([way.seed & _SEED_BITS for way in params], dtype=np.uint64).view(np.int64)
    keys = np.stack((seeds, np.array([draw.position for draw in draws], dtype=np.int64)), axis=1)
    banned = [(row, token) for row, draw in enumerate(draws) for token in draw.banned_token_ids]
    return kernels.sample(logits, kernels.plan_draws(ways, keys, banned, logits.device))
