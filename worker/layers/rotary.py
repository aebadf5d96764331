"""Rotary positions: the frequencies a model's rope settings ask for, and the angles of a step's positions.

Invariant: angles are computed in float32 from the position, whatever the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from worker.models.config import Rope


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and signed sine of a step, each `[num_tokens, 1, 2, head_dim / 2]`, as `kernels.rotary_` takes them."""

    cos: torch.Tensor
    sin: torch.Tensor


class RotaryEmbedding:
    """Angles for any position; no table, so no length to size it for."""

    def __init__(self, rope: Rope, head_dim: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)  # [head_dim / 2] float32
        self._sign = torch.tensor([-1.0, 1.0], device=device).view(1, 1, 2, 1)
        self._dtype = dtype

    def __call__(self, positions: torch.Tensor) -> Angles:
        """Angles of `positions[num_tokens]` (int64)."""
        angle = positions.to(torch.float32)[:, None, None, None] * self._frequencies
        cos, sin = angle.cos(), angle.sin()
        return Angles(cos.expand(-1, -1, 2, -1).to(self._dtype), (sin * self._sign).to(self._dtype))


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair, `[head_dim / 2]` float32, after the model's scaling."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return plain


def _llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Slow pairs are stretched by `factor`, fast ones kept, those between blended by their turns in the old context."""
    turns = rope.original_max_positions * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain
