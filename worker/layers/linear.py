"""A matrix and its bias, if any."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias` with `weight[out, in]`, packed or not, and `bias[out]`."""

    weight: kernels.Weight
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(x, self.weight, self.bias)
