"""The plan of a step for the Triton kernels: all work lists on the device, sent there in one copy.

Knows numbers and one device. Invariant: nothing in it depends on the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count

import numpy as np
import numpy.typing as npt
import torch

from kernels.configs import Processor, Tuning, tuning
from kernels.fixed_work_list import fixed_work_list
from kernels.quantize import KV, StoredKV
from kernels.step import Ints, checked_step
from kernels.work_list import WorkList, work_list


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """A `WorkList` on the device."""

    rows: int
    decode: torch.Tensor
    wide: torch.Tensor
    tokens: torch.Tensor
    part_slots: torch.Tensor
    merges: torch.Tensor


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What the kernels do in every layer of a step. All numbers are int32."""

    num_tokens: int
    slots: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    tables: torch.Tensor  # [num_seqs, max_blocks]
    work: dict[int | None, DeviceWork]  # by window
    sink_work: frozenset[int]  # windows that some sequence is longer than, where they have sinks
    parts: torch.Tensor  # [num_slots, num_heads, head_dim] float32: room for results that are not complete
    states: torch.Tensor  # [num_slots, num_heads] float32
    counters: torch.Tensor  # [num_tokens, num_kv_heads], zero between launches
    side: torch.cuda.Stream | None  # what may run beside the rest of a layer's attention runs here
    tuning: Tuning
    fixed: bool = False  # whether a row takes the same steps in any step


def plan_attention(
    kv_cache: KV,
    query_lens: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    block_tables: Ints,
    *,
    num_heads: int,
    windows: Sequence[int | None] = (None,),
    sinks: Mapping[int, int] | None = None,
    tuned: Tuning | None = None,
    deterministic: bool = False,
) -> DevicePlan:
    """As `kernels.plan_attention`; `tuned` stands in for the table of configurations."""
    step = checked_step(kv_cache, query_lens, context_lens, block_tables)
    tuned = tuned or device_tuning(kv_cache)
    sinks = sinks or {}
    slots = step.slots()
    planned = fixed_work_list if deterministic else work_list
    lists = {
        window: planned(step, num_heads, window, 0 if window is None else sinks.get(window, 0), tuned)
        for window in dict.fromkeys(windows)
    }
    longest = int(step.context_lens.max(initial=0))
    sent = _sent([slots, step.positions()[1], step.block_tables, *_arrays(lists)], step.device)
    works = [
        DeviceWork(made.rows, *sent[index : index + 5])
        for made, index in zip(lists.values(), count(3, 5), strict=False)
    ]
    most = max(made.num_slots for made in lists.values())
    return DevicePlan(
        num_tokens=step.num_tokens,
        slots=sent[0],
        positions=sent[1],
        tables=sent[2],
        work=dict(zip(lists, works, strict=True)),
        sink_work=frozenset(w for w in lists if w is not None and sinks.get(w, 0) and longest > w),
        parts=torch.empty((most, num_heads, step.head_dim), dtype=torch.float32, device=step.device),
        states=torch.empty((most, num_heads), dtype=torch.float32, device=step.device),
        counters=torch.zeros((step.num_tokens, step.num_kv_heads), dtype=torch.int32, device=step.device),
        side=side_stream(step.device),
        tuning=tuned,
        fixed=deterministic,
    )


def device_tuning(kv_cache: KV) -> Tuning:
    """What the table of configurations says for this cache where it is."""
    scaled = isinstance(kv_cache, StoredKV) and kv_cache.format.largest > 0
    return tuning(kv_cache.shape[-1], kv_cache.dtype.itemsize, _processor(kv_cache.device), scaled=scaled)


@cache
def _processor(device: torch.device) -> Processor:
    if device.type != "cuda":
        return Processor()
    return Processor(multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _arrays(lists: Mapping[int | None, WorkList]) -> list[Ints]:
    made = lists.values()
    return [part for of in made for part in (of.decode, of.wide, of.tokens, of.part_slots, of.merges)]


def _sent(arrays: Sequence[npt.NDArray[np.int64] | npt.NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """Each array as int32 on the device. They begin at multiples of 16 bytes: kernels are compiled for those."""
    starts = np.cumsum([0, *(-(-array.size // 4) * 4 for array in arrays)])
    flat = np.zeros(int(starts[-1]), dtype=np.int32)
    for start, array in zip(starts[:-1].tolist(), arrays, strict=True):
        flat[start : start + array.size] = array.ravel()
    there = torch.from_numpy(flat).to(device, non_blocking=True)
    return [
        there[start : start + array.size].view(array.shape)
        for start, array in zip(starts[:-1].tolist(), arrays, strict=True)
    ]
