"""Operations on the CPU by native code, one call each; what it does not take goes to `kernels.reference`.

Knows tensors and plans. Invariant: a row's result is the same, to the last bit, whatever else is in the batch and
however its context was cut into chunks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kernels import plan as host_plan
from kernels import reference
from kernels.cpu_calls import Shape, native, num_threads
from kernels.cpu_plan import CpuPlan, make_plan
from kernels.cpu_sampling import argmax, sample
from kernels.cpu_weights import PackedWeight, can_pack
from kernels.quantize import KV
from kernels.reference import copy_blocks, head_rms_norm_, merge_states, rotary_, silu_mul
from kernels.step import Ints

__all__ = [
    "add_rms_norm",
    "argmax",
    "attention",
    "copy_blocks",
    "head_rms_norm_",
    "merge_states",
    "pack",
    "plan_attention",
    "rms_norm",
    "rotary_",
    "rotary_write_kv",
    "sample",
    "silu_mul",
    "sink_attention",
    "write_kv",
]

Plan = CpuPlan | host_plan.AttentionPlan


def pack(weight: torch.Tensor, *, gated: bool = False) -> PackedWeight | torch.Tensor:
    """As `kernels.pack`."""
    return PackedWeight(weight, gated=gated) if can_pack(weight) else weight


def plan_attention(
    kv_cache: KV,
    query_lens: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    block_tables: Ints,
    *,
    num_heads: int,
    windows: Sequence[int | None] = (None,),
    sinks: Mapping[int, int] | None = None,
) -> Plan:
    """As `kernels.plan_attention`."""
    if any((sinks or {}).values()) or not _takes_cache(kv_cache):
        return reference.plan_attention(
            kv_cache, query_lens, context_lens, block_tables, num_heads=num_heads, windows=windows, sinks=sinks
        )
    num_kv_heads, block_size, _ = kv_cache.shape[3:]
    shape = {"block_size": block_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    return make_plan(query_lens, context_lens, block_tables, windows, **shape)


def attention(
    query: torch.Tensor, layer_kv: KV, plan: Plan, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """As `kernels.attention`."""
    if not isinstance(plan, CpuPlan):
        return reference.attention(query, layer_kv, plan, scale=scale, window=window)
    assert isinstance(layer_kv, torch.Tensor)  # as every cache of such a plan
    query = query.float()
    query = query if query.stride()[1:] == (query.shape[2], 1) else query.contiguous()
    out = torch.empty(query.shape, dtype=layer_kv.dtype)
    shape = cache_shape(layer_kv, num_heads=query.shape[1], scale=scale, window=window)
    failed = native().pando_attention(
        query.data_ptr(),
        query.stride(0),
        layer_kv.data_ptr(),
        ctypes.byref(plan.struct()),
        ctypes.byref(shape),
        out.data_ptr(),
        num_threads(),
        layer_kv.dtype == torch.bfloat16,
    )
    if failed:
        raise MemoryError("no memory for a step's attention")
    return out


def cache_shape(layer_kv: torch.Tensor, *, num_heads: int, scale: float, window: int | None = None) -> Shape:
    """How native code finds its way in one layer of the cache."""
    num_kv_heads, block_size, head_dim = layer_kv.shape[2:]
    return Shape(num_heads, num_kv_heads, head_dim, block_size, layer_kv.stride(0), window or 0, scale)


def sink_attention(
    query: torch.Tensor, sink_query: torch.Tensor, layer_kv: KV, plan: Plan, *, scale: float, window: int
) -> torch.Tensor:
    """As `kernels.sink_attention`."""
    if isinstance(plan, CpuPlan):
        return attention(query, layer_kv, plan, scale=scale, window=window)
    return reference.sink_attention(query, sink_query, layer_kv, plan, scale=scale, window=window)


def write_kv(key_value: torch.Tensor, layer_kv: KV, plan: Plan) -> None:
    """As `kernels.write_kv`."""
    if not isinstance(plan, CpuPlan):
        return reference.write_kv(key_value, layer_kv, plan)
    assert isinstance(layer_kv, torch.Tensor)
    size = layer_kv.shape[3]
    block, offset = map(torch.from_numpy, np.divmod(plan.slots, size))
    layer_kv.flatten(1, 2)[block, :, offset] = key_value
    return None


def rotary_write_kv(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer_kv: KV, plan: Plan) -> None:
    """As `kernels.rotary_write_kv`."""
    if not isinstance(plan, CpuPlan) or not isinstance(layer_kv, torch.Tensor) or not _takes(heads):
        num_kv_heads = layer_kv.shape[2]
        rotary_(heads[:, :-num_kv_heads], cos, sin)
        return write_kv(heads[:, -2 * num_kv_heads :], layer_kv, plan)
    shape = cache_shape(layer_kv, num_heads=heads.shape[1] - 2 * layer_kv.shape[2], scale=1.0)
    cos, sin = cos.contiguous(), sin.contiguous()
    angles = (cos.data_ptr(), sin.data_ptr())
    rest = (plan.slots.ctypes.data, len(heads), ctypes.byref(shape), num_threads())
    native().pando_rotary_write(heads.data_ptr(), *angles, layer_kv.data_ptr(), *rest)
    return None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `kernels.rms_norm`."""
    return _norm(None, x, weight, eps) if _takes(x, weight) else reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.add_rms_norm`."""
    if not _takes(x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    return _norm(x, residual, weight, eps), residual


def _takes(*tensors: torch.Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def _takes_cache(cache: KV) -> bool:
    if not isinstance(cache, torch.Tensor) or cache.device.type != "cpu" or not cache.is_contiguous():
        return False
    if cache.dtype == torch.bfloat16:
        return bool(native().pando_has_bf16()) and cache.shape[-1] % 2 == 0
    return cache.dtype == torch.float32


def _norm(x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(residual)
    pointer = None if x is None else x.data_ptr()
    rows, width = residual.shape
    pointers = (pointer, residual.data_ptr(), weight.data_ptr(), out.data_ptr())
    native().pando_norm(*pointers, rows, width, eps, num_threads())
    return out
