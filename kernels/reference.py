"""Every operation in plain torch: what runs without Triton, and what Triton kernels are compared with.

Knows tensors and plans. Invariant: no loop over tokens; per step and layer a few operations per group of decoding
sequences and per tile of a prefill chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.plan import AttentionPlan, Gather, WindowWork, plan_attention
from kernels.quantize import KV, StoredKV
from kernels.sampling import argmax, sample

__all__ = [
    "add_rms_norm",
    "argmax",
    "attention",
    "copy_blocks",
    "head_rms_norm_",
    "merge_states",
    "plan_attention",
    "rms_norm",
    "rotary_",
    "rotary_write_kv",
    "sample",
    "silu_mul",
    "sink_attention",
    "write_kv",
]

# Bound of the scores held at once where they are computed in the open, in elements.
MOST_SCORES = 1 << 24


def attention(
    query: torch.Tensor,
    layer_kv: KV,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """As `kernels.attention`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _attend(query, layer_kv, plan, plan.work[window], scale=scale, out=out)
    return out


def sink_attention(
    query: torch.Tensor,
    sink_query: torch.Tensor,
    layer_kv: KV,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int,
) -> torch.Tensor:
    """As `kernels.sink_attention`."""
    work = plan.sink_work.get(window)
    if work is None:
        return attention(query, layer_kv, plan, scale=scale, window=window)
    parts = torch.zeros((2, *query.shape), dtype=torch.float32, device=query.device)
    states = torch.full(parts.shape[:-1], -torch.inf, device=query.device)
    _attend_in_part(query, layer_kv, plan, work.window, scale=scale, into=(parts[0], states[0]))
    _attend_in_part(sink_query, layer_kv, plan, work.sinks, scale=scale, into=(parts[1], states[1]))
    out = merge_states(parts, states).to(query.dtype)
    _attend(query, layer_kv, plan, plan.work[window], scale=scale, out=out)
    return out


def merge_states(parts: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """As `kernels.merge_states`."""
    largest = states.amax(0)
    weights = torch.exp(states - largest.masked_fill(largest == -torch.inf, 0))
    total = weights.sum(0).clamp_(min=torch.finfo(weights.dtype).tiny)
    return (parts * (weights / total)[..., None]).sum(0)


def _attend(
    query: torch.Tensor,
    layer_kv: KV,
    plan: AttentionPlan,
    work: WindowWork,
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write the result of the tokens of `work` into `out`."""
    num_kv_heads = layer_kv.shape[2]
    group = query.shape[1] // num_kv_heads
    for decode in work.decode:
        keys, values = gathered(layer_kv, decode.gather, plan.workspace)
        # The heads of a group share their keys, so they are the query rows of one small matmul.
        rows = query[decode.tokens].view(decode.gather.num_rows, num_kv_heads, group, -1)
        result = F.scaled_dot_product_attention(rows, keys, values, attn_mask=decode.mask, scale=scale)
        out[decode.tokens] = result.reshape(decode.gather.num_rows, query.shape[1], -1)
    for chunk in work.prefill:
        keys, values = gathered(layer_kv, chunk.gather, plan.workspace)
        for tile in chunk.tiles:
            # [num_kv_heads, group, rows, head_dim] against one key head for each group, repeated by stride 0.
            part = query[tile.tokens]
            rows = part.view(part.shape[0], num_kv_heads, group, -1).permute(1, 2, 0, 3)
            seen = keys[0, :, None, tile.keys].expand(-1, group, -1, -1)
            mixed = values[0, :, None, tile.keys].expand(-1, group, -1, -1)
            result = F.scaled_dot_product_attention(rows, seen, mixed, attn_mask=tile.mask, scale=scale)
            out[tile.tokens] = result.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_in_part(
    query: torch.Tensor,
    layer_kv: KV,
    plan: AttentionPlan,
    work: WindowWork,
    *,
    scale: float,
    into: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """`_attend` that leaves the softmax state beside the result: `into` is `[num_tokens, num_heads,
    head_dim]` and `[num_tokens, num_heads]`. Each query of `work` sees at least one key."""
    out, states = into
    num_kv_heads = layer_kv.shape[2]
    group = query.shape[1] // num_kv_heads
    for decode in work.decode:
        keys, values = gathered(layer_kv, decode.gather, plan.workspace)
        rows = query[decode.tokens].view(decode.gather.num_rows, num_kv_heads, group, -1)
        result, state = _softmax_part(rows, keys, values, decode.mask, scale)
        out[decode.tokens] = result.flatten(1, 2)
        states[decode.tokens] = state.flatten(1, 2)
    for chunk in work.prefill:
        keys, values = gathered(layer_kv, chunk.gather, plan.workspace)
        for tile in chunk.tiles:
            part = query[tile.tokens]
            rows = part.view(part.shape[0], num_kv_heads, group, -1).permute(1, 2, 0, 3)
            seen = keys[0, :, None, tile.keys].expand(-1, group, -1, -1)
            mixed = values[0, :, None, tile.keys].expand(-1, group, -1, -1)
            result, state = _softmax_part(rows, seen, mixed, tile.mask, scale)
            out[tile.tokens] = result.permute(2, 0, 1, 3).flatten(1, 2)
            states[tile.tokens] = state.permute(2, 0, 1).flatten(1, 2)


def _softmax_part(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `rows[a, b, n, head_dim]` and the logarithms of its sums of exponentials, `[a, b, n]`; float32."""
    if rows.device.type == "cpu":
        # The one operation behind `scaled_dot_product_attention` on the CPU, which does not pass on what it returns.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, attn_mask=mask, scale=scale
        )
        return fused[0].float(), fused[1]
    parts = []
    step = max(1, MOST_SCORES // (rows[0, ..., 0].numel() * keys.shape[2]))
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        scores = torch.matmul(rows[part].float(), keys[part].float().transpose(-1, -2)).mul_(scale)
        scores.add_(mask[part] if mask.dim() == rows.dim() else mask)
        state = scores.logsumexp(-1)
        parts.append((torch.matmul(scores.sub_(state[..., None]).exp_(), values[part].float()), state))
    return torch.cat([result for result, _ in parts]), torch.cat([state for _, state in parts])


def write_kv(key_value: torch.Tensor, layer_kv: KV, plan: AttentionPlan) -> None:
    """As `kernels.write_kv`."""
    head_dim = key_value.shape[2]
    if isinstance(layer_kv, StoredKV):
        layer_kv.write(key_value.reshape(-1, head_dim), plan.slot_rows)
        return
    rows = _rows(layer_kv, head_dim)
    rows.index_copy_(0, plan.slot_rows, key_value.reshape(-1, head_dim))


def rotary_write_kv(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer_kv: KV, plan: AttentionPlan
) -> None:
    """As `kernels.rotary_write_kv`."""
    num_kv_heads = layer_kv.shape[2]
    rotary_(heads[:, :-num_kv_heads], cos, sin)
    write_kv(heads[:, -2 * num_kv_heads :], layer_kv, plan)


def copy_blocks(kv_cache: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """As `kernels.copy_blocks`."""
    kv_cache.index_copy_(0, targets, kv_cache.index_select(0, sources))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `kernels.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.add_rms_norm`."""
    residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, eps), residual


def head_rms_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """As `kernels.head_rms_norm_`."""
    x.copy_(F.rms_norm(x, x.shape[2:], None, eps)).mul_(weight)


def rotary_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """As `kernels.rotary_`."""
    halves = x.view(*x.shape[:2], 2, -1)
    swapped = halves.flip(2)
    halves.mul_(cos).addcmul_(swapped, sin)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `kernels.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    # torch's own silu rounds the last elements of a run in another way than those before them.
    wide = gate.float()
    return wide.div(wide.neg().exp_().add_(1)).to(gate.dtype).mul_(up)


def gathered(layer_kv: KV, gather: Gather, workspace: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [num_rows, num_kv_heads, length, head_dim], zero where dead; valid until the next call."""
    _, _, num_kv_heads, block_size, head_dim = layer_kv.shape
    width = block_size * head_dim
    rows = workspace[: gather.head_rows.numel() * width].view(-1, width)
    if isinstance(layer_kv, StoredKV):
        layer_kv.gather(gather.head_rows, rows)
    else:
        torch.index_select(_rows(layer_kv, width), 0, gather.head_rows, out=rows)
    # A weight of zero does not silence a NaN, so positions outside the context are cleared, not only masked.
    rows.view(-1, head_dim).index_fill_(0, gather.dead, 0)
    dense = rows.view(2, gather.num_rows, num_kv_heads, gather.length, head_dim)
    return dense[0], dense[1]


def _rows(layer_kv: torch.Tensor, width: int) -> torch.Tensor:
    """The cache from this layer's first element on, as rows of `width` elements: a view."""
    block_stride = layer_kv.stride(0)
    elements = (layer_kv.shape[0] - 1) * block_stride + layer_kv[0].numel()
    return layer_kv.as_strided((elements // width, width), (width, 1), layer_kv.storage_offset())
