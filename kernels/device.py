"""Every operation as a Triton kernel: what runs on CUDA. `kernels.reference` says the same in plain torch.

Knows tensors and device plans. Invariant: no operation waits for the device or reads from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton

from kernels.configs import PRODUCT, SamplingConfig
from kernels.device_plan import DevicePlan, plan_attention
from kernels.jit.decode import decode_kernel, merge_kernel
from kernels.jit.linear import linear_kernel
from kernels.jit.rows import head_norm_kernel, norm_kernel, silu_mul_kernel, write_kernel
from kernels.jit.sampling import ban_kernel, sample_kernel
from kernels.jit.wide import wide_kernel
from kernels.quantize import KV, StoredKV
from kernels.reference import copy_blocks, merge_states, rotary_
from kernels.sampling import COLUMNS, Draws

__all__ = [
    "add_rms_norm",
    "attention",
    "copy_blocks",
    "head_rms_norm_",
    "linear",
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

LOG2_E = 1.4426950408889634
HEADS_A_PROGRAM = 8
GATES_A_PROGRAM = 1024
BANS_A_PROGRAM = 128


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `kernels.linear` of a weight that was packed for deterministic mode."""
    rows, inputs = x.shape
    outputs, tile = weight.shape[0], PRODUCT
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    linear_kernel[triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs)](
        out, x, weight, weight if bias is None else bias, rows, outputs, inputs, HAS_BIAS=bias is not None,
        ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs, EVEN=inputs % tile.inputs == 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def attention(
    query: torch.Tensor, layer_kv: KV, plan: DevicePlan, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """As `kernels.attention`."""
    return _attend(query, None, layer_kv, plan, (scale, window))


def sink_attention(
    query: torch.Tensor,
    sink_query: torch.Tensor,
    layer_kv: KV,
    plan: DevicePlan,
    *,
    scale: float,
    window: int,
) -> torch.Tensor:
    """As `kernels.sink_attention`."""
    has_sinks = window in plan.sink_work
    return _attend(query, sink_query if has_sinks else None, layer_kv, plan, (scale, window))


def _attend(
    query: torch.Tensor,
    sink_query: torch.Tensor | None,
    layer_kv: KV,
    plan: DevicePlan,
    scale_window: tuple[float, int | None],
) -> torch.Tensor:
    scale, window = scale_window
    work = plan.work[window]
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = layer_kv.shape[2:4]
    group = num_heads // num_kv_heads
    scorer = query if sink_query is None else sink_query
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    kv, kv_scales, kind = _addressed(layer_kv)
    numbers = (scale * LOG2_E, query.stride(0), scorer.stride(0), kv.stride(0), plan.tables.stride(0))
    shape = {"NUM_KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "DIM": _padded(head_dim)}
    loop = {"BLOCK_SIZE": block_size, "HAS_SINKS": sink_query is not None, **kind}
    merging = {"STEP": 1 if plan.fixed else _merge_step(group, head_dim), "ROWS": triton.next_power_of_2(group)}
    if len(work.wide):
        wide = plan.tuning.many if work.rows > plan.tuning.wide.rows else plan.tuning.wide
        # Beside decoding, on a stream of its own: the one is bound by products, the other by memory.
        with _beside(plan.side if len(work.decode) else None):
            wide_kernel[num_kv_heads, len(work.wide)](
                out, query, scorer, kv, kv_scales, plan.tables, work.wide, work.tokens, plan.positions,
                plan.parts, plan.states, *numbers, **shape, **loop, ROWS=work.rows, TILE=wide.tile, FIXED=plan.fixed,
                num_warps=wide.num_warps, num_stages=wide.num_stages,
            )  # fmt: skip
    if len(work.decode):
        decode = plan.tuning.decode
        decode_kernel[num_kv_heads, len(work.decode)](
            out, query, scorer, kv, kv_scales, plan.tables, work.decode, work.part_slots,
            plan.parts, plan.states, plan.counters, *numbers, **shape, **loop,
            ROWS=_padded(group), MERGE_ROWS=merging["ROWS"], MERGE_STEP=merging["STEP"], TILE=decode.tile,
            num_warps=decode.num_warps, num_stages=decode.num_stages,
        )  # fmt: skip
        if len(work.wide) and plan.side is not None:
            torch.cuda.current_stream().wait_stream(plan.side)
    if len(work.merges):
        merge_kernel[num_kv_heads, len(work.merges)](
            out, work.part_slots, plan.parts, plan.states, work.merges, **shape, **merging
        )
    return out


@contextmanager
def _beside(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Launch on that stream what the current one has come to."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield


def _merge_step(group: int, head_dim: int) -> int:
    """Parts that are merged at once: as many as registers hold."""
    return min(64, max(1, 8192 // int(triton.next_power_of_2(group) * _padded(head_dim))))


def _padded(size: int) -> int:
    """To what a matrix unit takes."""
    return max(16, int(triton.next_power_of_2(size)))


def write_kv(key_value: torch.Tensor, layer_kv: KV, plan: DevicePlan) -> None:
    """As `kernels.write_kv`."""
    _write(key_value, None, layer_kv, plan)


def rotary_write_kv(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer_kv: KV, plan: DevicePlan) -> None:
    """As `kernels.rotary_write_kv`."""
    _write(heads, (cos, sin), layer_kv, plan)


def _write(
    heads: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    layer_kv: KV,
    plan: DevicePlan,
) -> None:
    num_tokens, num_heads, head_dim = heads.shape
    num_kv_heads, block_size = layer_kv.shape[2:4]
    cos, sin = angles or (heads, heads)
    kv, kv_scales, kind = _addressed(layer_kv)
    kind["LARGEST"] = layer_kv.format.largest if isinstance(layer_kv, StoredKV) else 0.0
    if kind["KIND"] == "fp8":
        kv = kv.view(torch.uint8)  # the kernel rounds, and writes bits
    write_kernel[num_tokens, triton.cdiv(num_heads, HEADS_A_PROGRAM)](
        heads, cos, sin, kv, kv_scales, plan.slots,
        heads.stride(0), cos.stride(0), sin.stride(0), kv.stride(0),
        NUM_QUERY=num_heads - 2 * num_kv_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2), BLOCK_SIZE=block_size,
        HEADS=HEADS_A_PROGRAM, ROTATE=angles is not None, **kind, num_warps=2,
    )  # fmt: skip


def _addressed(layer_kv: KV) -> tuple[torch.Tensor, torch.Tensor, dict[str, object]]:
    """The vectors and the scales of a layer as the kernels take them, and how they are laid out."""
    if isinstance(layer_kv, torch.Tensor):
        return layer_kv, layer_kv, {"HEAD_ROW": layer_kv.stride(2), "KIND": "same"}
    values, scaled = layer_kv.values, layer_kv.format.largest > 0
    kind = {"HEAD_ROW": values.stride(2), "KIND": layer_kv.format.name if scaled else "same"}
    return values, layer_kv.scales if scaled else values, kind


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `kernels.rms_norm`, of `x[num_tokens, n]`."""
    return _norm(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.add_rms_norm`."""
    return _norm(x, residual, weight, eps), residual


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    num_rows, size = x.shape
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(size)
    added = x if residual is None else residual
    norm_kernel[(num_rows,)](
        out, x, added, weight, eps, x.stride(0), added.stride(0),
        SIZE=size, WIDTH=width, ADD=residual is not None, num_warps=min(16, max(1, width // 512)),
    )  # fmt: skip
    return out


def head_rms_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """As `kernels.head_rms_norm_`."""
    num_tokens, num_heads, head_dim = x.shape
    head_norm_kernel[num_tokens, triton.cdiv(num_heads, HEADS_A_PROGRAM)](
        x, weight, eps, x.stride(0), num_heads,
        HEAD_DIM=head_dim, DIM=triton.next_power_of_2(head_dim), HEADS=HEADS_A_PROGRAM, num_warps=2,
    )  # fmt: skip


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `kernels.silu_mul`."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    silu_mul_kernel[num_rows, triton.cdiv(size, GATES_A_PROGRAM)](out, gate_up, size, TILE=GATES_A_PROGRAM)
    return out


def sample(logits: torch.Tensor, draws: Draws, config: SamplingConfig | None = None) -> torch.Tensor:
    """As `kernels.sample`."""
    config = config or SamplingConfig()
    count, vocab = logits.shape
    num_banned = len(draws.banned)
    if num_banned:
        ban_kernel[(triton.cdiv(num_banned, BANS_A_PROGRAM),)](
            logits, draws.banned, logits.stride(0), num_banned, SIZE=BANS_A_PROGRAM
        )
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    values = torch.empty((count, config.room), dtype=torch.float32, device=logits.device)
    ids = torch.empty((count, config.room), dtype=torch.int32, device=logits.device)
    # Fused, products and sums would be rounded otherwise than on the CPU.
    sample_kernel[(count,)](
        tokens, logits, draws.rows, values, ids, logits.stride(0), vocab,
        TILE=config.tile, ROOM=config.room, GUIDE=config.guide, STEP=config.step, PIVOTS=config.pivots,
        STAGES=config.num_stages, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """As `kernels.argmax`."""
    nothing = torch.zeros((len(logits), COLUMNS), dtype=torch.int64, device=logits.device)
    return sample(logits, Draws(nothing, nothing[:0, :2]))
