"""A decoder but for its head in one native call, from token ids to the last norm.

Knows weights, caches and plans. Invariant: it gives what the operations one by one give, within rounding; in bfloat16
the residual stream stays float32 on the way.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from kernels.cpu import cache_shape
from kernels.cpu_calls import Frequencies, Layer, Packed, Stack, Teams, Tokens, WholeStep, check, native, num_threads
from kernels.cpu_plan import CpuPlan, most_together
from kernels.cpu_weights import PackedWeight
from kernels.fixed_order import FixedTiles
from kernels.quantize import KV
from kernels.step import StepNumbers

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


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All of a decoder. `frequencies`: radians per position of each rotary pair; angles are computed in their dtype."""

    embedding: torch.Tensor  # [vocab_size, hidden_size]
    layers: Sequence[LayerWeights]
    norm: torch.Tensor  # [hidden_size], behind the layers
    head: PackedWeight | FixedTiles | torch.Tensor  # vocab_size outputs
    frequencies: torch.Tensor  # [head_dim / 2]


class CpuStack:
    """A model as native code takes it. The tensors it was made of must not change after."""

    def __init__(self, of: DecoderWeights, *, num_heads: int, head_dim: int, norm_eps: float) -> None:
        self._num_heads, self._head_dim = num_heads, head_dim
        self._dtype, self._norm = of.norm.dtype, of.norm.float()
        self._embedding, self._frequencies = of.embedding.contiguous(), of.frequencies.double()
        exact = of.frequencies.dtype == torch.float64
        self._rotary = Frequencies(self._frequencies.data_ptr(), exact)
        self._kept: list[object] = []
        self._head = of.head if isinstance(of.head, PackedWeight) and of.head.dtype == of.norm.dtype else None
        self._windows = array("q", dict.fromkeys(layer.window or 0 for layer in of.layers))
        self._logits = torch.empty((0, 0))
        self._layers = (Layer * len(of.layers))(*map(self._layer, of.layers))
        down = of.layers[0].down[0]
        assert isinstance(down, PackedWeight)
        self._hidden_size, self._intermediate_size = down.outputs, down.inputs
        self._norm_eps = norm_eps
        self._most_together = (1, 1)
        self._bound: tuple[Sequence[torch.Tensor], Stack, ctypes.Array[ctypes.c_void_p]] | None = None
        self.spent_ns: ctypes.Array[ctypes.c_int64] | None = None
        """Where set, [6], nanoseconds are added to it: of the layers' products, of attention, of all else there, of the
        head, of the most likely tokens, and of plans."""

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
        stack, caches = self._over(layers_kv)
        pointers = (ctypes.byref(stack), ctypes.byref(tokens), caches, out.data_ptr())
        check(native().pando_layers(*pointers, num_threads(), self._dtype == torch.bfloat16))
        return out

    def takes_steps(self, layers_kv: Sequence[KV]) -> TypeGuard[Sequence[torch.Tensor]]:
        """Whether `most_likely` and `logits` can be had over these caches."""
        return self._head is not None and self.takes(layers_kv)

    def most_likely(self, step: StepNumbers, layers_kv: Sequence[torch.Tensor]) -> list[int]:
        """Run a whole step, KV written; of each of `step.wanted` the most likely next token, as `kernels.argmax` says.
        Raises ValueError and IndexError as `kernels.plan_attention` and `kernels.run_layers`."""
        best = array("q", bytes(8 * step.num_wanted))
        self._run_step(step, layers_kv, best.buffer_info()[0])
        return best.tolist()

    def logits(self, step: StepNumbers, layers_kv: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `most_likely`, with the logits, `[num_wanted, vocab_size]` float32: until the next step."""
        return self._run_step(step, layers_kv, None)

    def _run_step(self, step: StepNumbers, layers_kv: Sequence[torch.Tensor], best: int | None) -> torch.Tensor:
        stack, caches = self._over(layers_kv)
        if len(self._logits) < step.num_wanted:
            assert self._head is not None
            self._logits = torch.empty((step.num_wanted, self._head.outputs))
        whole = WholeStep(step.numbers.buffer_info()[0], step.num_seqs, step.num_wanted, step.num_tokens, step.width)
        whole.windows, whole.num_windows = self._windows.buffer_info()
        whole.most_tokens, whole.most_sequences = self._most_together
        if self.spent_ns is not None:
            whole.spent = ctypes.addressof(self.spent_ns)
        pointers = (ctypes.byref(stack), ctypes.byref(whole), caches, self._logits.data_ptr(), best)
        check(native().pando_step(*pointers, num_threads(), self._dtype == torch.bfloat16))
        return self._logits[: step.num_wanted]

    def _over(self, layers_kv: Sequence[torch.Tensor]) -> tuple[Stack, ctypes.Array[ctypes.c_void_p]]:
        """The decoder over these caches, which as a rule are those of all steps, and their first elements."""
        bound = self._bound
        if bound is None or bound[0] is not layers_kv:
            self._bound = bound = (layers_kv, *self._bind(layers_kv))
        return bound[1:]

    def _bind(self, layers_kv: Sequence[torch.Tensor]) -> tuple[Stack, ctypes.Array[ctypes.c_void_p]]:
        stack = Stack(
            self._embedding.data_ptr(),
            len(self._embedding),
            self._rotary,
            self._layers,
            len(self._layers),
            self._norm.data_ptr(),
            Packed() if self._head is None else self._head.struct(None),
            self._hidden_size,
            self._intermediate_size,
            self._norm_eps,
            cache_shape(layers_kv[0], num_heads=self._num_heads, scale=self._head_dim**-0.5),
        )
        self._most_together = most_together(self._num_heads, layers_kv[0].shape[2])
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


def stack_of(of: DecoderWeights, *, num_heads: int, head_dim: int, norm_eps: float) -> CpuStack | None:
    """The decoder as one, None where native code does not take all weights of its layers."""
    weights = [w for layer in of.layers for w, _ in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    if not weights or not all(isinstance(weight, PackedWeight) and weight.dtype == of.norm.dtype for weight in weights):
        return None
    return CpuStack(of, num_heads=num_heads, head_dim=head_dim, norm_eps=norm_eps)
