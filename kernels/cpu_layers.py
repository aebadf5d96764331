"""A decoder but for its head in one native call, from token ids to the last norm.

Knows weights, caches and plans. Invariant: it gives what the operations one by one give, within rounding; in bfloat16
the residual stream stays float32 on the way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from kernels.cpu import cache_shape
from kernels.cpu_calls import Frequencies, Layer, Stack, Teams, Tokens, native, num_threads
from kernels.cpu_plan import CpuPlan
from kernels.cpu_weights import PackedWeight
from kernels.fixed_order import FixedTiles
from kernels.quantize import KV

Biased = tuple["PackedWeight | FixedTiles | torch.Tensor", "torch.Tensor | None"]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: `qkv`, `output`, `gate_up` (gated) and `down` each with its bias, norms, and the window if any."""

    attention_norm: torch.Tensor  # [hidden_size]
    qkv: Biased
    qk_norm: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]
    output: Biased
    mlp_norm: torch.Tensor  # [hidden_size]
    gate_up: Biased
    down: Biased
    window: int | None


class CpuStack:
    """Layers of one model as native code takes them. The tensors it was made of must not change after."""

    def __init__(
        self,
        embedding: torch.Tensor,
        layers: Sequence[LayerWeights],
        norm: torch.Tensor,
        frequencies: torch.Tensor,
        *,
        num_heads: int,
        head_dim: int,
        norm_eps: float,
    ) -> None:
        self._num_heads, self._head_dim = num_heads, head_dim
        self._dtype, self._norm = norm.dtype, norm.float()
        self._embedding, self._frequencies = embedding.contiguous(), frequencies.double()
        exact = frequencies.dtype == torch.float64
        self._rotary = Frequencies(self._frequencies.data_ptr(), exact)
        self._kept: list[object] = []
        self._layers = (Layer * len(layers))(*(self._layer(layer) for layer in layers))
        down = layers[0].down[0]
        assert isinstance(down, PackedWeight)
        self._hidden_size, self._intermediate_size = down.outputs, down.inputs
        self._norm_eps = norm_eps
        self._bound: tuple[Sequence[torch.Tensor], Stack, ctypes.Array[ctypes.c_void_p]] | None = None
        self.spent_ns: ctypes.Array[ctypes.c_int64] | None = None
        """Where set, nanoseconds are added to it: those of products, of attention and of all else."""

    def takes(self, layers_kv: Sequence[KV]) -> TypeGuard[Sequence[torch.Tensor]]:
        """Whether the caches are such as native code reads and writes."""
        return all(isinstance(kv, torch.Tensor) and kv.dtype == self._dtype for kv in layers_kv)

    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        layers_kv: Sequence[torch.Tensor],
        plan: CpuPlan,
        *,
        last: tuple[torch.Tensor, CpuPlan | None] | None = None,
    ) -> torch.Tensor:
        """As `kernels.run_layers`; `last` is the rows wanted and the plan of their queries alone."""
        token_ids, positions = token_ids.contiguous(), positions.contiguous()
        rows = len(token_ids)
        count = rows if last is None else len(last[0])
        out = torch.empty((count, self._hidden_size), dtype=self._dtype)
        tokens = Tokens(rows, token_ids.data_ptr(), positions.data_ptr(), plan.slots.ctypes.data)
        tokens.teams = plan.struct()
        if last is not None:
            # Any address but null: nothing is read through it where there are no rows.
            tokens.last, tokens.num_last = last[0].data_ptr() or token_ids.data_ptr(), count
            tokens.last_teams = Teams() if last[1] is None else last[1].struct()
        if self.spent_ns is not None:
            tokens.spent = ctypes.addressof(self.spent_ns)
        if self._bound is None or self._bound[0] is not layers_kv:
            self._bound = (layers_kv, *self._bind(layers_kv))
        _, stack, caches = self._bound
        pointers = (ctypes.byref(stack), ctypes.byref(tokens), caches, out.data_ptr())
        failed = native().pando_layers(*pointers, num_threads(), self._dtype == torch.bfloat16)
        if failed == 1:
            raise MemoryError("no memory for a step")
        if failed:
            raise IndexError("a token id is not in the vocabulary")
        return out

    def _bind(self, layers_kv: Sequence[torch.Tensor]) -> tuple[Stack, ctypes.Array[ctypes.c_void_p]]:
        """The decoder over these caches, which as a rule are those of all steps, and their first elements."""
        stack = Stack(
            self._embedding.data_ptr(),
            len(self._embedding),
            self._rotary,
            self._layers,
            len(self._layers),
            self._norm.data_ptr(),
            self._hidden_size,
            self._intermediate_size,
            self._norm_eps,
            cache_shape(layers_kv[0], num_heads=self._num_heads, scale=self._head_dim**-0.5),
        )
        return stack, (ctypes.c_void_p * len(layers_kv))(*(kv.data_ptr() for kv in layers_kv))

    def _layer(self, of: LayerWeights) -> Layer:
        norms = [None if norm is None else norm.float() for norm in (of.attention_norm, of.qk_norm, of.mlp_norm)]
        biases = [None if bias is None else bias.float() for _, bias in (of.qkv, of.output, of.gate_up, of.down)]
        weights = [weight for weight, _ in (of.qkv, of.output, of.gate_up, of.down)]
        self._kept += [norms, biases, weights]
        attention_norm, qk_norm, mlp_norm = (None if norm is None else norm.data_ptr() for norm in norms)
        packed = [w.struct(b) for w, b in zip(weights, biases, strict=True) if isinstance(w, PackedWeight)]
        qkv, output, gate_up, down = packed
        return Layer(attention_norm, qkv, qk_norm, output, mlp_norm, gate_up, down, of.window or 0)


def stack_of(
    embedding: torch.Tensor,
    layers: Sequence[LayerWeights],
    norm: torch.Tensor,
    frequencies: torch.Tensor,
    *,
    num_heads: int,
    head_dim: int,
    norm_eps: float,
) -> CpuStack | None:
    """The layers as one, None where native code does not take all of their weights."""
    weights = [w for of in layers for w, _ in (of.qkv, of.output, of.gate_up, of.down)]
    if not layers or not all(isinstance(weight, PackedWeight) and weight.dtype == norm.dtype for weight in weights):
        return None
    shape = {"num_heads": num_heads, "head_dim": head_dim}
    return CpuStack(embedding, layers, norm, frequencies, **shape, norm_eps=norm_eps)
