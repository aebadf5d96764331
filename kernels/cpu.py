"""Operations on the CPU in float32 by native code; what it does not take goes to `kernels.reference`.

Knows tensors and plans. Invariant: a row's result is the same, to the last bit, whatever else is in the batch and
however its context was cut into chunks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from kernels import plan as host_plan
from kernels import reference
from kernels.cpu_library import library
from kernels.quantize import KV
from kernels.reference import copy_blocks, head_rms_norm_, merge_states, rotary_
from kernels.step import Ints, Step, checked_step

__all__ = [
    "add_rms_norm",
    "attention",
    "copy_blocks",
    "head_rms_norm_",
    "linear",
    "merge_states",
    "pack",
    "plan_attention",
    "rms_norm",
    "rotary_",
    "rotary_write_kv",
    "silu_mul",
    "sink_attention",
    "write_kv",
]

# Query rows (tokens times heads of a group) that one piece of attention works on.
ROWS = 128


class PackedWeight:
    """`weight[outputs, inputs]` in panels of some outputs, as native code reads it: `[panels, inputs, panel]`."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        width = int(_native().pando_panel())
        self.panels = torch.zeros((-(-self.outputs // width), self.inputs, width))
        for index in range(len(self.panels)):
            part = weight[index * width : (index + 1) * width]
            self.panels[index, :, : part.shape[0]] = part.T


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A step as native code takes it: tables as they are, and pieces of each sequence's queries."""

    num_tokens: int
    sink_work: dict[int, host_plan.SinkWork]  # empty: a plan with sinks is the reference's
    slots: torch.Tensor  # [num_tokens] int64
    tables: npt.NDArray[np.int32]  # [num_seqs, max_blocks]
    tasks: npt.NDArray[np.int64]  # [num_tasks, 4]: sequence, first row, rows, position
    most_rows: int


Plan = CpuPlan | host_plan.AttentionPlan


def pack(weight: torch.Tensor) -> PackedWeight | torch.Tensor:
    """As `kernels.pack`."""
    return PackedWeight(weight) if _takes(weight) else weight


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """As `kernels.linear`, `x[rows, inputs]`."""
    x = x.contiguous()
    rows = x.shape[0]
    out = torch.empty((rows, weight.outputs))
    pointer = None if bias is None else bias.data_ptr()
    sizes = (rows, weight.outputs, weight.inputs, torch.get_num_threads())
    _native().pando_linear(x.data_ptr(), weight.inputs, weight.panels.data_ptr(), pointer, out.data_ptr(), *sizes)
    return out


def plan_attention(
    kv_cache: torch.Tensor,
    query_lens: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    block_tables: Ints,
    *,
    num_heads: int,
    windows: Sequence[int | None] = (None,),
    sinks: Mapping[int, int] | None = None,
) -> Plan:
    """As `kernels.plan_attention`."""
    if any((sinks or {}).values()) or not _takes(kv_cache):
        return reference.plan_attention(
            kv_cache, query_lens, context_lens, block_tables, num_heads=num_heads, windows=windows, sinks=sinks
        )
    step = checked_step(kv_cache, query_lens, context_lens, block_tables)
    for window in dict.fromkeys(windows):
        _check_tables(step, window)
    tasks = _tasks(step, max(1, ROWS * step.num_kv_heads // num_heads))
    slots = torch.from_numpy(step.slots())
    return CpuPlan(step.num_tokens, {}, slots, step.block_tables, tasks, int(tasks[:, 2].max()))


def attention(
    query: torch.Tensor, layer_kv: torch.Tensor, plan: Plan, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """As `kernels.attention`."""
    if not isinstance(plan, CpuPlan):
        return reference.attention(query, layer_kv, plan, scale=scale, window=window)
    query = query if query.stride()[1:] == (query.shape[2], 1) else query.contiguous()
    out = torch.empty(query.shape)
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = layer_kv.shape[2:4]
    strides = (query.stride(0), layer_kv.stride(0), plan.tables.shape[1])
    shape = _Shape(num_heads, num_kv_heads, head_dim, block_size, *strides, window or 0, scale)
    failed = _native().pando_attention(
        query.data_ptr(),
        layer_kv.data_ptr(),
        plan.tables.ctypes.data,
        plan.tasks.ctypes.data,
        len(plan.tasks),
        plan.most_rows,
        ctypes.byref(shape),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for a step's attention")
    return out


def sink_attention(
    query: torch.Tensor,
    sink_query: torch.Tensor,
    layer_kv: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    window: int,
) -> torch.Tensor:
    """As `kernels.sink_attention`."""
    if isinstance(plan, CpuPlan):
        return attention(query, layer_kv, plan, scale=scale, window=window)
    return reference.sink_attention(query, sink_query, layer_kv, plan, scale=scale, window=window)


def write_kv(key_value: torch.Tensor, layer_kv: torch.Tensor, plan: Plan) -> None:
    """As `kernels.write_kv`."""
    if not isinstance(plan, CpuPlan):
        return reference.write_kv(key_value, layer_kv, plan)
    size = layer_kv.shape[3]
    block, offset = plan.slots // size, plan.slots % size
    layer_kv.flatten(1, 2)[block, :, offset] = key_value
    return None


def rotary_write_kv(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer_kv: torch.Tensor, plan: Plan
) -> None:
    """As `kernels.rotary_write_kv`."""
    if not isinstance(plan, CpuPlan) or not heads.is_contiguous():
        num_kv_heads = layer_kv.shape[2]
        rotary_(heads[:, :-num_kv_heads], cos, sin)
        return write_kv(heads[:, -2 * num_kv_heads :], layer_kv, plan)
    num_kv_heads, block_size, head_dim = layer_kv.shape[2:]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    shape = (ctypes.c_int64 * 5)(num_heads, num_kv_heads, head_dim, block_size, layer_kv.stride(0))
    cos, sin = cos.contiguous(), sin.contiguous()
    angles = (cos.data_ptr(), sin.data_ptr())
    rest = (plan.slots.data_ptr(), heads.shape[0], shape, torch.get_num_threads())
    _native().pando_rotary_write(heads.data_ptr(), *angles, layer_kv.data_ptr(), *rest)
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


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `kernels.silu_mul`."""
    if not _takes(gate_up):
        return reference.silu_mul(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width))
    _native().pando_silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
    return out


class _Shape(ctypes.Structure):
    _fields_ = [
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("q_stride", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


@cache
def _native() -> ctypes.CDLL:
    """The library, its functions with their types: p a pointer, i an int64, f a float."""
    found = library()
    if found is None:
        raise RuntimeError("there are no native operations here")
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
    for name, arguments in (
        ("pando_panel", ""),
        ("pando_linear", "pippp" + "iiii"),
        ("pando_attention", "ppppii" + "ppi"),
        ("pando_norm", "pppp" + "iifi"),
        ("pando_silu_mul", "pp" + "iii"),
        ("pando_rotary_write", "ppppp" + "ipi"),
    ):
        function = getattr(found, name)
        function.argtypes = [kinds[kind] for kind in arguments]
    found.pando_panel.restype = ctypes.c_int64
    return found


def _takes(*tensors: KV) -> bool:
    return all(
        isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()
        for t in tensors
    )


def _norm(x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(residual)
    pointer = None if x is None else x.data_ptr()
    rows, width = residual.shape
    pointers = (pointer, residual.data_ptr(), weight.data_ptr(), out.data_ptr())
    _native().pando_norm(*pointers, rows, width, eps, torch.get_num_threads())
    return out


def _check_tables(step: Step, window: int | None) -> None:
    """Raises ValueError on a hole where the step reads: native code would follow it."""
    seen = step.seen(window)
    column = np.arange(step.block_tables.shape[1])[None, :]
    read = (column >= (seen.first // step.block_size)[:, None]) & (column * step.block_size < seen.end[:, None])
    if (step.block_tables[read] < 0).any():
        raise ValueError("a block table has a hole where it is read")


def _tasks(step: Step, most: int) -> Ints:
    """Pieces of at most `most` tokens. Long ones first, so that no thread is left with one at the end; sequences that
    begin with the same block one after the other, while their keys are in the cache."""
    pieces = -(-step.query_lens // most)
    sequence = np.repeat(np.arange(len(pieces)), pieces)
    begin = (np.arange(len(sequence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    rows = np.minimum(step.query_lens[sequence] - begin, most)
    position = (step.context_lens - step.query_lens)[sequence] + begin
    order = np.lexsort((step.block_tables[sequence, 0], -rows * (position + rows) * (rows > 1)))
    tasks = np.stack((sequence, step.query_starts[sequence] + begin, rows, position), axis=1)
    return np.ascontiguousarray(tasks[order])
