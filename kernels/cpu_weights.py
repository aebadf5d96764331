"""Weights as native code reads them: in panels of some outputs, of float32 or pairs of bfloat16.

Knows one matrix. Invariant: what pads a panel is zero.
"""

from __future__ import annotations

import ctypes

import torch

from kernels.cpu_calls import Packed, native, num_threads


class PackedWeight:
    """`weight[outputs, inputs]` in panels of some outputs, `[panels, words, panel]`; a word is one input in float32 and
    two in bfloat16. `gated`: the first half of the outputs are gates, the other what they let through; each panel has
    as many of both."""

    def __init__(self, weight: torch.Tensor, *, gated: bool = False) -> None:
        self.outputs, self.inputs = weight.shape
        self.dtype, self.gated = weight.dtype, gated
        width = int(native().pando_panel())
        words = weight.contiguous().view(torch.int32)
        parts = words.chunk(2 if gated else 1)
        width //= len(parts)
        count = -(-len(parts[0]) // width)
        panels = torch.empty((count, words.shape[1], len(parts), width), dtype=torch.int32)
        native().pando_large_pages(panels.data_ptr(), panels.nbytes)
        panels.zero_()
        for index in range(count):
            for side, part in enumerate(parts):
                some = part[index * width : (index + 1) * width]
                panels[index, :, side, : len(some)] = some.T
        self._panels = panels
        self._bias: torch.Tensor | None = None
        self._struct = self.struct(None)

    def struct(self, bias: torch.Tensor | None) -> Packed:
        """As native code takes it; `bias[outputs]` float32 must outlive it."""
        pointer = None if bias is None else bias.data_ptr()
        return Packed(self._panels.data_ptr(), pointer, self.outputs, self._panels.shape[1])

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x[rows, inputs] @ weight.T + bias`, through the gates if `gated`, of x's dtype. Raises ValueError if that is
        another than the weight's."""
        if x.dtype != self.dtype:
            raise ValueError(f"{x.dtype} does not go with a weight of {self.dtype}")
        x = x.contiguous()
        bias = None if bias is None else bias.float()
        half = self.dtype == torch.bfloat16
        if self.gated:
            out, call = torch.empty((len(x), self.outputs // 2), dtype=x.dtype), native().pando_gated_linear
        else:
            out, call = torch.empty((len(x), self.outputs)), native().pando_linear
        struct = self._struct if bias is None else self.struct(bias)
        call(x.data_ptr(), ctypes.byref(struct), out.data_ptr(), len(x), num_threads(), half)
        return out if out.dtype == x.dtype else out.to(x.dtype)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether native code takes such a weight."""
    if weight.device.type != "cpu" or weight.ndim != 2:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(native().pando_has_bf16()) and weight.shape[1] % 2 == 0
    return weight.dtype == torch.float32
