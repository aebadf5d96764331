"""Steps of decoding alone as recorded CUDA graphs: one launch of the host's instead of some hundreds.

Knows a decoder, its cache and static plans; nothing of batches. Invariant: a step that fits no graph is left to the
plain path, and what a graph gives is what the plain path gives, but for the kernels that torch chooses by the number of
rows. Not run on a GPU yet: tests/gpu holds what it must do there; elsewhere a recorder that calls again stands in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

import kernels
from kernels.static_plan import StaticPlan, StaticPlans
from kernels.step import Ints
from worker.kv_cache import KVCache
from worker.models.decoder import Decoder

log = logging.getLogger(__name__)

SMALL_SIZES = (1, 2, 4, 8)
STEP_OF_SIZES = 8  # sequences, beyond the small sizes
LARGEST_SIZE = 256

Key = tuple[int, bool]


class Recording(Protocol):
    """Launches that can be made again; `out` is where the last of them leaves its result."""

    out: torch.Tensor

    def replay(self) -> None: ...


Recorder = Callable[[Callable[[], torch.Tensor]], Recording]


class DecodeGraphs:
    """A recording for each static plan, all of which use the same memory: a result lasts until the next step."""

    def __init__(self, plans: StaticPlans, recordings: dict[Key, Recording]) -> None:
        self._plans, self._recordings = plans, recordings

    def hidden(
        self,
        token_ids: Ints,
        query_lens: Ints,
        context_lens: Ints,
        block_tables: Ints,
        *,
        followed: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Final hidden states of a step, `[num_tokens, hidden_size]`, with its KV written; None, and nothing done, if
        it fits no graph. Arguments as of `kernels.plan_attention`; `followed[num_tokens]`, on the device, stands for
        `token_ids` where the host does not know them yet. Does not wait for the device."""
        key = self._plans.filled(token_ids, query_lens, context_lens, block_tables)
        if key is None:
            return None
        if followed is not None:
            self._plans.plans[key].token_ids[: len(followed)].copy_(followed)
        recording = self._recordings[key]
        recording.replay()
        return recording.out[: len(token_ids)]


def record(
    decoder: Decoder, cache: KVCache, max_sequences: int, recorder: Recorder | None = None
) -> DecodeGraphs | None:
    """Record all sizes up to `max_sequences`. None, with a warning, where device or memory do not allow it."""
    if not kernels.takes_static_plans(cache.whole):
        log.warning("no CUDA graphs: there is no Triton")
        return None
    config = decoder.config
    plans = StaticPlans(
        cache.whole,
        sizes_for(max_sequences),
        num_heads=config.num_heads,
        windows=config.windows,
        sinks={} if config.sink_window is None else {config.sink_window: config.sinks},
        max_blocks=cache.num_blocks,
    )
    recorder = recorder or CudaRecorder()
    recordings: dict[Key, Recording] = {}
    try:
        # The largest first: the smaller ones fit its memory.
        for key in sorted(plans.plans, reverse=True):
            recordings[key] = _recorded(decoder, cache, plans.plans[key], recorder)
            log.info("recorded %d of %d CUDA graphs: %d sequences", len(recordings), len(plans.plans), key[0])
    except RuntimeError as error:  # out of memory is one, too
        log.warning("no CUDA graphs: %s", error)
        return None
    return DecodeGraphs(plans, recordings)


def sizes_for(max_sequences: int) -> tuple[int, ...]:
    """The numbers of sequences that are recorded: a step takes the next one. The last covers `max_sequences`, or as
    many as are worth it."""
    most = min(max_sequences, LARGEST_SIZE)
    small = [size for size in SMALL_SIZES if size < most]
    large = range(SMALL_SIZES[-1] + STEP_OF_SIZES, most, STEP_OF_SIZES)
    return (*small, *large, most)


@torch.inference_mode()
def _recorded(decoder: Decoder, cache: KVCache, static: StaticPlan, recorder: Recorder) -> Recording:
    # No step is filled in yet: what is launched meanwhile reads the first row and writes no KV.
    return recorder(lambda: decoder.hidden(static.token_ids, static.plan.positions, cache.layers, static.plan))


class CudaRecorder:
    """Records launches in CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> Recording:
        run()  # kernels are built and libraries chosen before anything is recorded
        torch.cuda.synchronize()
        return _CudaRecording(run, self._pool)


class _CudaRecording:
    def __init__(self, run: Callable[[], torch.Tensor], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.out = run()

    def replay(self) -> None:
        self._graph.replay()
