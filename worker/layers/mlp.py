"""The gated feed-forward part of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels
from worker.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """`down(silu(gate(x)) * up(x))` with gate and up in one matrix, packed `gated`."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(kernels.gated_linear(x, self.gate_up.weight, self.gate_up.bias))
