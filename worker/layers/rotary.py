"""Rotary positions: the frequencies a model's rope settings ask for, and the angles of a step's positions.

Invariant: angles are computed in float32 from the position, whatever the model's dtype, as models are trained. There an
angle is off by up to position / 2^24 radians; where positions may run without end it is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from worker.models.config import Rope


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and signed sine of a step, each `[num_tokens, 1, 2, head_dim / 2]`, as `kernels.rotary_` takes them.
    `sink` turns the queries that score attention sinks, in a step that has any."""

    cos: torch.Tensor
    sin: torch.Tensor
    sink: Angles | None = None


class RotaryEmbedding:
    """Angles for any position; no table, so no length to size it for."""

    def __init__(
        self, rope: Rope, head_dim: int, *, device: torch.device, dtype: torch.dtype, endless: bool = False
    ) -> None:
        self._angle_dtype = torch.float64 if endless else torch.float32
        self.frequencies = inverse_frequencies(rope, head_dim).to(device, self._angle_dtype)  # [head_dim / 2]
        """Of each pair, in the dtype that angles are computed in."""
        self._sign = torch.tensor([-1.0, 1.0], device=device).view(1, 1, 2, 1)
        self._dtype = dtype

    def __call__(self, positions: torch.Tensor, *, farthest: int | None = None) -> Angles:
        """Angles of `positions[num_tokens]` (int64), and with `farthest` those for sinks: of no position behind it."""
        sink = None if farthest is None else self(positions.clamp(max=farthest))
        angle = positions.to(self._angle_dtype)[:, None, None, None] * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        return Angles(cos.expand(-1, -1, 2, -1).to(self._dtype), (sin * self._sign).to(self._dtype), sink)


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
