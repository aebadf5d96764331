"""Tensors in, tensors out: the operations a decoder over paged KV needs, in plain torch on any device.

Knows tensors, block tables and slots; nothing of sequences, tenants or scheduling. Invariant: an operation reads no
cache position outside the context it was given, so garbage (NaN too) in unused positions never reaches a result.

Dimensions, named once:

    num_tokens     rows of one step, all its sequences packed one after the other
    num_seqs       sequences of one step
    num_heads      query heads; num_kv_heads key and value heads; group = num_heads // num_kv_heads
    head_dim       width of one head
    num_blocks     KV blocks of the pool; block_size token positions of a block; max_blocks width of a block table
    num_layers     layers whose KV a block holds
    query_len      tokens of a sequence computed in this step; context_len those plus all before them
    slot           block_id * block_size + offset: one token position in the pool

The cache is one allocation, `kv_cache[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` (2: key, value);
`layer_kv = kv_cache[:, layer]` is a view of one layer, `[num_blocks, 2, num_kv_heads, block_size, head_dim]`. In place
of both may stand a `StoredKV`, which holds the same in another format than it is computed in: see `kernels.quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from kernels import cpu, fixed_order, fixed_plan, reference
from kernels import plan as host_plan
from kernels.cpu_calls import num_threads, set_num_threads
from kernels.cpu_layers import CpuStack, DecoderWeights, LayerWeights, stack_of
from kernels.cpu_library import library
from kernels.cpu_plan import CpuPlan
from kernels.cpu_weights import PackedWeight
from kernels.device_plan import DevicePlan
from kernels.fixed_order import FixedTiles
from kernels.fixed_plan import FixedPlan
from kernels.quantize import FORMATS, KV, KVFormat, StoredKV, stored
from kernels.sampling import Draws, plan_draws
from kernels.step import Ints, StepNumbers

AttentionPlan = host_plan.AttentionPlan | CpuPlan | DevicePlan | FixedPlan
Weight = torch.Tensor | PackedWeight | FixedTiles

__all__ = [
    "FORMATS",
    "KV",
    "AttentionPlan",
    "CpuStack",
    "DecoderWeights",
    "Draws",
    "KVFormat",
    "LastRows",
    "LayerWeights",
    "StepNumbers",
    "StoredKV",
    "Weight",
    "add_rms_norm",
    "argmax",
    "attention",
    "copy_blocks",
    "gated_linear",
    "head_rms_norm_",
    "linear",
    "merge_states",
    "num_threads",
    "pack",
    "plan_attention",
    "plan_draws",
    "rms_norm",
    "rotary_",
    "rotary_write_kv",
    "run_layers",
    "sample",
    "set_num_threads",
    "silu_mul",
    "sink_attention",
    "stack",
    "stored",
    "takes_static_plans",
    "write_kv",
]


@dataclass(frozen=True, slots=True)
class LastRows:
    """Rows of a step, of which alone the result is wanted: `rows[n]` int64, and the plan of their queries, one token
    each; None where there are no rows."""

    rows: torch.Tensor
    plan: AttentionPlan | None


@cache
def _device_operations() -> ModuleType:
    try:
        from kernels import device
    except ImportError:  # torch for CUDA without Triton
        return reference
    return device


@cache
def _cpu_operations() -> ModuleType:
    return reference if library() is None else cpu


def _operations(tensor: KV) -> ModuleType:
    """What computes where the tensor is: Triton on CUDA, native code on the CPU where it can be built, else plain
    torch."""
    return _device_operations() if tensor.is_cuda else _cpu_operations()


def takes_static_plans(tensor: KV) -> bool:
    """Whether the operations where the tensor is take plans of `kernels.static_plan`: those in Triton do."""
    return _operations(tensor).__name__ == "kernels.device"


def _in_plain_torch(tensor: KV) -> bool:
    """Whether plain torch computes what native code does not take, or everything."""
    return _operations(tensor) in (reference, cpu)


def _planned(tensor: torch.Tensor, plan: AttentionPlan) -> ModuleType:
    return fixed_order if isinstance(plan, FixedPlan) else _operations(tensor)


def pack(weight: torch.Tensor, *, gated: bool = False, deterministic: bool = False) -> Weight:
    """`weight[outputs, inputs]` as `linear` takes it where the weight is: another tensor in memory, or itself; if
    `gated`, `weight[2 * outputs, inputs]`, gates first, as `gated_linear` takes it.

    If `deterministic`, a row of a product is the same to the last bit whatever the other rows are and how many.
    """
    packed: Weight = cpu.pack(weight, gated=gated) if _operations(weight) is cpu else weight
    return FixedTiles(packed) if deterministic and isinstance(packed, torch.Tensor) else packed


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x[num_tokens, inputs] @ weight.T + bias[outputs]`."""
    if isinstance(weight, PackedWeight):
        return weight.times(x, bias)
    if isinstance(weight, FixedTiles):
        if _in_plain_torch(x):
            return fixed_order.linear(x, weight, bias)
        product: torch.Tensor = _operations(x).linear(x, weight.weight, bias)
        return product
    return F.linear(x, weight, bias)


def gated_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate) * up` of `linear` with a `gated` weight: `[num_tokens, outputs]`."""
    return weight.times(x, bias) if isinstance(weight, PackedWeight) else silu_mul(linear(x, weight, bias))


def stack(of: DecoderWeights, *, num_heads: int, head_dim: int, norm_eps: float) -> CpuStack | None:
    """A decoder for `run_layers` and whole steps; None where it goes operation by operation."""
    if of.norm.device.type != "cpu" or _cpu_operations() is not cpu:
        return None
    return stack_of(of, num_heads=num_heads, head_dim=head_dim, norm_eps=norm_eps)


def run_layers(
    layers: CpuStack | None,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    layers_kv: Sequence[KV],
    plan: AttentionPlan,
    *,
    last: LastRows | None = None,
) -> torch.Tensor | None:
    """All layers over `token_ids[num_tokens]` at `positions[num_tokens]` (both int64) and the norm behind them, of all
    rows or of `last`: `[n, hidden_size]`. The step's KV is written. None if this step must go operation by operation.
    Raises IndexError on an id that the embedding does not have."""
    if layers is None or not isinstance(plan, CpuPlan) or not layers.takes(layers_kv):
        return None
    if last is None:
        return layers.run(token_ids, positions, layers_kv, plan)
    assert last.plan is None or isinstance(last.plan, CpuPlan)
    return layers.run(token_ids, positions, layers_kv, plan, last=(last.rows, last.plan))


def plan_attention(
    kv_cache: KV,
    query_lens: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    block_tables: Ints,
    *,
    num_heads: int,
    windows: Sequence[int | None] = (None,),
    sinks: Mapping[int, int] | None = None,
    deterministic: bool = False,
) -> AttentionPlan:
    """Plan one step over `kv_cache`, of which only shape, dtype and device are used, for queries of `num_heads`.

    Sequence i computes `query_lens[i]` >= 1 tokens, the last of its `context_lens[i]`; they are packed in order.
    `block_tables[num_seqs, max_blocks]` holds the block ids that cover each context; entries past it, and those
    between its sinks and its window, are not read. A window of W lets a position see itself and the W - 1 before it,
    and with `sinks[W]` the first positions of the sequence too. Sequences whose tables begin with the same blocks may
    have these read once for all. Raises ValueError if a table is too short or has a hole, a negative id, where it is
    read. If `deterministic`, a token's result is the same to the last bit whatever else is in the step and wherever
    the step begins in its sequence.
    """
    operations = _operations(kv_cache)
    arguments: tuple[Any, ...] = (kv_cache, query_lens, context_lens, block_tables)
    options: dict[str, Any] = {"num_heads": num_heads, "windows": windows, "sinks": sinks}
    if deterministic and operations is reference:
        return fixed_plan.plan_attention(*arguments, **options)
    if deterministic and not _in_plain_torch(kv_cache):
        options["deterministic"] = True
    made: AttentionPlan = operations.plan_attention(*arguments, **options)
    if deterministic and isinstance(made, host_plan.AttentionPlan):  # nothing that native code takes
        return fixed_plan.plan_attention(*arguments, **options)
    return made


def attention(
    query: torch.Tensor, layer_kv: KV, plan: AttentionPlan, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of `query[num_tokens, num_heads, head_dim]` over the paged contexts of `plan`.

    The step's own keys and values are in `layer_kv` already (see `write_kv`). `window` must be one of the plan's.
    Scores are multiplied by `scale`. Returns `[num_tokens, num_heads, head_dim]`.
    """
    out: torch.Tensor = _planned(query, plan).attention(query, layer_kv, plan, scale=scale, window=window)
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
    """`attention` over a window W and the S first positions of the plan's `sinks[W]`, which stay as they are cached.

    `sink_query` is the query rotated for min(its position, S + W - 1): to it the sinks lie right before the window,
    however far the sequence has come. What both see is merged by their softmax states.
    """
    operations = _planned(query, plan)
    out: torch.Tensor = operations.sink_attention(query, sink_query, layer_kv, plan, scale=scale, window=window)
    return out


def merge_states(parts: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The softmax over several sets of keys from the softmax over each: `parts[num_parts, ..., head_dim]` are their
    results, `states[num_parts, ...]` the logarithms of the sums of their exponentials, -inf (beside any finite part)
    for an empty set. Returns `[..., head_dim]`, zero where all are empty."""
    merged: torch.Tensor = _operations(parts).merge_states(parts, states)
    return merged


def write_kv(key_value: torch.Tensor, layer_kv: KV, plan: AttentionPlan) -> None:
    """Write the step's keys and values, `key_value[num_tokens, 2 * num_kv_heads, head_dim]` (keys, then values),
    into the slots of `plan`. Keys are rotated already."""
    _planned(key_value, plan).write_kv(key_value, layer_kv, plan)


def rotary_write_kv(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer_kv: KV, plan: AttentionPlan
) -> None:
    """`rotary_` of the queries in `heads[num_tokens, num_heads + 2 * num_kv_heads, head_dim]` (queries, keys, values),
    in place, and `write_kv` of the keys, rotated too, and the values. The keys' own place is undefined after."""
    _planned(heads, plan).rotary_write_kv(heads, cos, sin, layer_kv, plan)


def copy_blocks(kv_cache: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy blocks `sources[n]` to `targets[n]` (int64), all layers; all sources are read before a target is written.
    Of a `StoredKV` it takes the `rows`."""
    _operations(kv_cache).copy_blocks(kv_cache, sources, targets)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x[num_tokens, n]` over the root of its mean square in the last dimension, times `weight[n]`."""
    out: torch.Tensor = _operations(x).rms_norm(x, weight, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` into `residual` (in place; both `[num_tokens, n]`); returns the norm of the sum, and the sum."""
    out: tuple[torch.Tensor, torch.Tensor] = _operations(x).add_rms_norm(x, residual, weight, eps)
    return out


def head_rms_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Norm each head of `x[num_tokens, heads, head_dim]` in place, with its own row of `weight[heads, head_dim]`."""
    _operations(x).head_rms_norm_(x, weight, eps)


def rotary_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate `x[num_tokens, heads, head_dim]` in place; element i is paired with element i + head_dim / 2.

    `cos` and `sin` are `[num_tokens, 1, 2, head_dim / 2]`, of x's dtype; `sin` has the sign of each half,
    minus first.
    """
    _operations(x).rotary_(x, cos, sin)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `gate_up[num_tokens, 2 * n]` (gate, then up): `[num_tokens, n]`."""
    out: torch.Tensor = _operations(gate_up).silu_mul(gate_up)
    return out


def sample(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A token id for each row of `logits[n, vocab_size]` (float32, at most 2^20 wide; banned tokens become -inf in
    them), by the rule of `kernels.sampling`: `[n]` int64 where the logits are, the same on every device."""
    tokens: torch.Tensor = _operations(logits).sample(logits, draws)
    return tokens


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row of `logits[n, vocab_size]` (float32): what `sample` draws where every row is
    greedy and none has banned tokens, with nothing planned."""
    tokens: torch.Tensor = _operations(logits).argmax(logits)
    return tokens
