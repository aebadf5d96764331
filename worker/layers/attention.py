"""Self-attention of one layer over the paged cache.

Knows its weights and the step's plan; nothing of sequences. Invariant: keys are rotated before they are cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels
from worker.layers.linear import Linear
from worker.layers.rotary import Angles


@dataclass(frozen=True, slots=True)
class Attention:
    """Fused projection (queries, keys, values), optional norm of queries and keys per head, rotation, output."""

    qkv: Linear
    output: Linear
    qk_norm: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]
    norm_eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    sinks: int = 0  # first positions that queries see beside the window

    def __call__(
        self,
        x: torch.Tensor,
        angles: Angles,
        layer_kv: kernels.KV,
        plan: kernels.AttentionPlan,
        last: kernels.LastRows | None = None,
    ) -> torch.Tensor:
        """`x[num_tokens, hidden_size]` to the same shape, or to the rows of `last`; writes this step's keys and values
        to `layer_kv`."""
        heads = self.qkv(x).view(x.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        query_key = heads[:, : self.num_heads + self.num_kv_heads]
        if self.qk_norm is not None:
            kernels.head_rms_norm_(query_key, self.qk_norm, self.norm_eps)
        query = heads[:, : self.num_heads]
        turned_for_sinks = self._turned(query, angles.sink)
        kernels.rotary_write_kv(heads, angles.cos, angles.sin, layer_kv, plan)
        if last is not None:
            if last.plan is None:
                return x.new_empty((0, x.shape[1]))
            plan, query = last.plan, query.index_select(0, last.rows)
            turned_for_sinks = None if turned_for_sinks is None else turned_for_sinks.index_select(0, last.rows)
        scale = self.head_dim**-0.5
        if turned_for_sinks is None or self.window is None:
            mixed = kernels.attention(query, layer_kv, plan, scale=scale, window=self.window)
        else:
            mixed = kernels.sink_attention(query, turned_for_sinks, layer_kv, plan, scale=scale, window=self.window)
        return self.output(mixed.view(mixed.shape[0], -1))

    def _turned(self, query: torch.Tensor, angles: Angles | None) -> torch.Tensor | None:
        """The query as it scores sinks, where there are any."""
        if not self.sinks or angles is None:
            return None
        turned = query.clone()
        kernels.rotary_(turned, angles.cos, angles.sin)
        return turned
