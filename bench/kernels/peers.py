"""What torch itself does with the same shapes: scaled_dot_product_attention over KV that is dense already.

The gather that paged KV would need first is not counted, in the peer's favour.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from bench.kernels.shapes import Setting
from bench.kernels.timing import graph_microseconds

MOST_BYTES = 12 << 30


def sdpa_microseconds(setting: Setting) -> float | None:
    """Time of one layer; None where shapes are unequal, the copy is too large, or torch refuses."""
    shape = setting.shape
    num_heads, num_kv_heads, head_dim = shape.heads
    count, length = len(shape.context_lens), shape.context_lens[0]
    layer_bytes = 4 * num_kv_heads * head_dim * sum(shape.context_lens)
    layers = min(setting.num_layers, MOST_BYTES // layer_bytes)
    if len(set(shape.context_lens)) > 1 or layers < 1:
        return None
    queries = shape.query_lens[0]
    dense = [torch.stack([setting.dense(layer, s) for s in range(count)], 1) for layer in range(layers)]
    rows = [setting.queries[layer].view(count, queries, num_heads, head_dim).transpose(1, 2) for layer in range(layers)]
    mask = causal_lower_right(queries, length) if queries > 1 else None

    def run(layer: int) -> torch.Tensor:
        keys, values = dense[layer]
        return F.scaled_dot_product_attention(rows[layer], keys, values, attn_mask=mask, enable_gqa=True)

    return _or_none(lambda: graph_microseconds(run, layers))


def _or_none(measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except (RuntimeError, TypeError, ValueError):  # no kernel of torch's takes the shape
        return None
