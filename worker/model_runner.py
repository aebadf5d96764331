"""The runner that computes: a decoder, its KV cache and a sampler behind the `Runner` face.

Knows batches; nothing of queues, tenants, block keys or the wire, and needs neither Ray, Redis nor gRPC. Invariant:
what a step computes for a sequence depends on that sequence's tokens alone, whatever else is in the batch.
"""

from __future__ import annotations

import logging
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

import kernels
from pando.errors import ConfigError
from pando.model_folder import resolve_model
from pando.settings import WorkerSettings
from worker import kv_cache, sampler
from worker.batch import Batch, SamplingParams, ScheduledSequence
from worker.checks import check_kv, check_length
from worker.cpu_tier import CpuTier
from worker.graphs import DecodeGraphs, record
from worker.models.config import ModelConfig, read_config, with_window
from worker.models.decoder import Decoder, load_decoder
from worker.native_steps import native_steps
from worker.runner import ModelSpec, StepInFlight
from worker.step_inputs import Ints, StepInputs, independent_copies, step_inputs, written_blocks
from worker.step_stream import StreamStep
from worker.step_thread import ThreadStep
from worker.weights import Checkpoint, fingerprint, weight_files

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# One more CPU thread for so many bytes of weights.
BYTES_PER_THREAD = 64 * 1024 * 1024

# The longest sequence where attention has a window: rotary angles stay exact far beyond it.
ENDLESS = 1 << 30


def load_model_runner(settings: WorkerSettings) -> ModelRunner:
    """Load the model that `settings` name. Raises `ConfigError` with one line if that cannot work."""
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    check_kv(settings)
    if device.type == "cuda" and settings.kv_dtype == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("--kv-dtype fp8 needs a device of compute capability 8.9 or later")
    deterministic = settings.deterministic == "on"
    folder = resolve_model(settings.model)
    config = _config(settings, folder)
    threads = settings.threads or _worthwhile_threads(folder, available=_cores())
    if device.type == "cpu":
        torch.set_num_threads(threads)
    with torch.inference_mode(), Checkpoint(folder, device=device, dtype=dtype) as checkpoint:
        decoder = load_decoder(config, checkpoint, partial(kernels.pack, deterministic=deterministic))
    cache = _allocate(settings, config, dtype, device)
    if decoder.stack is not None and isinstance(cache.whole, torch.Tensor):
        kernels.set_num_threads(threads)
        torch.set_num_threads(1)  # it has little to do, and its threads would take the cores
    spec = ModelSpec(
        name=Path(settings.model).name if Path(settings.model).is_dir() else settings.model,
        fingerprint=fingerprint(folder, config, _kv_name(settings, dtype)),
        vocab_size=config.vocab_size,
        max_model_len=_max_model_len(settings, config, cache.num_blocks),
        eos_token_ids=config.eos_token_ids,
        num_blocks=cache.num_blocks,
        block_size=settings.block_size,
        window=config.num_kept,
        sinks=config.sinks,
    )
    mover = None
    if settings.cpu_blocks:
        mover = CpuTier(cache.blocks, settings.cpu_blocks, cpu_dtype=settings.cpu_kv_dtype, payload=cache.payload)
    log.info("loaded %s on %s with %d KV blocks of %s", config.architecture, device, cache.num_blocks, cache.payload)
    runner = ModelRunner(decoder, cache, spec, mover, deterministic=deterministic)
    if device.type == "cuda":
        _warm_up(runner)
        if settings.cuda_graphs == "auto" and not deterministic:  # their plans are of another order
            runner.graphs = record(decoder, cache, settings.max_sequences)
    return runner


def _warm_up(runner: ModelRunner) -> None:
    """Have every kernel built before the first request: a long chunk, a short one, a decode. Nobody finds what they
    leave in the first blocks."""
    room = runner.spec.num_blocks * runner.spec.block_size
    for count in (min(64, room), min(2, room), 1):
        blocks = tuple(range(-(-count // runner.spec.block_size)))
        tokens = array("I", [0] * count)
        runner.execute(Batch((ScheduledSequence(0, tokens, 0, blocks, SamplingParams()),)))


class ModelRunner:
    """Executes batches one after the other on one device, from one thread."""

    def __init__(
        self,
        decoder: Decoder,
        cache: kv_cache.KVCache,
        spec: ModelSpec,
        mover: CpuTier | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        self.spec = spec
        self.mover = mover
        self.graphs: DecodeGraphs | None = None  # for the steps that fit one
        self._decoder: Decoder | None = decoder
        self._cache: kv_cache.KVCache | None = cache
        self._device = cache.blocks.device
        self._deterministic = deterministic
        config = decoder.config
        self._windows = tuple(dict.fromkeys(config.windows))
        self._sinks = {} if config.sink_window is None else {config.sink_window: config.sinks}
        # A CUDA stream is what a thread is elsewhere: launching waits for nothing.
        self._thread = None if self._device.type == "cuda" else ThreadPoolExecutor(1, "step")
        self._native = native_steps(decoder, cache)
        self._none_drawn = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._drawn = self._none_drawn

    @property
    def runs_beside(self) -> bool:
        return self._device.type == "cuda"

    def execute(self, batch: Batch) -> list[int]:
        """Run the step; one token id for each sequence that has `sampling`, in batch order."""
        return self._tokens(self._prepared(batch))

    def launch(self, batch: Batch) -> StepInFlight:
        """The step goes to the device's stream; where that is the CPU, to a thread of its own."""
        step = self._prepared(batch)
        if self._thread is None:
            return StreamStep(self._run(step))
        return ThreadStep(self._thread.submit(lambda: self._tokens(step)))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Run the step and return the logits after every token of it, `[num_tokens, vocab_size]` float32 on the CPU:
        for tests and for perplexity; nothing is sampled."""
        inputs = self._prepared(batch)
        self._copy_blocks(inputs)
        hidden = self._hidden(inputs, self._tensor(inputs.step.token_ids), None)
        return self.decoder.logits(hidden).cpu()

    def close(self) -> None:
        """Free weights and cache, CPU memory too, when the steps launched have ended. The runner must not be used
        after."""
        if self._thread is not None:
            self._thread.shutdown()
        if self.mover is not None:
            self.mover.close()
        self._decoder = self._native = None
        self._cache = None
        self.graphs = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def cache(self) -> kv_cache.KVCache:
        """The device tier's tensors."""
        if self._cache is None:
            raise RuntimeError("the runner is closed")
        return self._cache

    @property
    def decoder(self) -> Decoder:
        if self._decoder is None:
            raise RuntimeError("the runner is closed")
        return self._decoder

    def _prepared(self, batch: Batch) -> StepInputs:
        """All that is read of a batch; from here on its step may run."""
        if self.mover is not None:
            self.mover.before_writes(written_blocks(batch, self.spec.block_size))
        return step_inputs(batch, self.spec)

    def _tokens(self, step: StepInputs) -> list[int]:
        """What is drawn, when it is known."""
        if self._native is None:
            drawn: list[int] = self._run(step).tolist()
            return drawn
        self._copy_blocks(step)
        return self._native.run(step)

    @torch.inference_mode()
    def _run(self, inputs: StepInputs) -> torch.Tensor:
        """What is drawn, int64 on the device. Does not wait for it."""
        drawn, self._drawn = self._drawn, self._none_drawn
        token_ids = self._tensor(inputs.step.token_ids)
        followed = [pair for pair in inputs.followed if pair[1] < len(drawn)]  # none is, of a step that failed
        if followed:
            at = self._tensor(np.array(followed, dtype=np.int64))
            token_ids[at[:, 0]] = drawn[at[:, 1]]
        self._copy_blocks(inputs)
        hidden = self._hidden(inputs, token_ids, inputs.step.wanted)
        if inputs.draws:
            if inputs.drawn_from is not None:  # forks draw from one row
                hidden = hidden.index_select(0, self._tensor(np.array(inputs.drawn_from)))
            self._drawn = sampler.start(self.decoder.logits(hidden), inputs.draws)
        return self._drawn

    def _hidden(self, inputs: StepInputs, token_ids: torch.Tensor, wanted: Ints | None) -> torch.Tensor:
        """After the last token of each of the `wanted` sequences, by their number in the batch, or after all tokens."""
        cache, step = self.cache, inputs.step
        rows = None if wanted is None else inputs.query_ends[wanted] - 1
        if self.graphs is not None and rows is not None:
            followed = token_ids if inputs.followed else None
            lens = (step.query_lens, step.context_lens)
            replayed = self.graphs.hidden(step.token_ids, *lens, step.block_tables, followed=followed)
            if replayed is not None:
                return replayed.index_select(0, self._tensor(rows))
        plan = self._plan(step.query_lens, step.context_lens, step.block_tables)
        whole = rows is None or len(rows) == step.num_tokens
        last = None
        if rows is not None and wanted is not None and not whole and self._device.type == "cpu":
            last = kernels.LastRows(self._tensor(rows), self._plan_last(step, wanted))
        hidden = self.decoder.hidden(token_ids, self._tensor(inputs.positions), cache.layers, plan, last)
        if rows is None or whole or last is not None:
            return hidden
        return hidden.index_select(0, self._tensor(rows))

    def _plan_last(self, step: kernels.StepNumbers, wanted: Ints) -> kernels.AttentionPlan | None:
        """Of the last token alone of these sequences, which is all that the last layer has to attend for."""
        if not len(wanted):
            return None
        return self._plan(np.ones_like(wanted), step.context_lens[wanted], step.block_tables[wanted])

    def _plan(self, query_lens: Ints, context_lens: Ints, block_tables: Ints) -> kernels.AttentionPlan:
        return kernels.plan_attention(
            self.cache.whole,
            query_lens,
            context_lens,
            block_tables,
            num_heads=self.decoder.config.num_heads,
            windows=self._windows,
            sinks=self._sinks,
            deterministic=self._deterministic,
        )

    def _copy_blocks(self, inputs: StepInputs) -> None:
        for copies in independent_copies(inputs.copies):
            pairs = self._tensor(np.array([(copy.source, copy.target) for copy in copies], dtype=np.int64))
            kernels.copy_blocks(self.cache.blocks, pairs[:, 0], pairs[:, 1])

    def _tensor(self, values: Ints) -> torch.Tensor:
        there = torch.from_numpy(values)
        if self._device.type != "cuda":
            return there
        # A copy from memory that is not pinned may wait for the device.
        return there.pin_memory().to(self._device, non_blocking=True)


def _config(settings: WorkerSettings, folder: Path) -> ModelConfig:
    """What the folder says, with the attention that the settings ask for."""
    config = read_config(folder)
    if settings.window:
        return with_window(config, settings.window, settings.sinks)
    if settings.sinks:
        raise ConfigError("sinks need a window: set --window too")
    return config


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for and this machine has none that torch can use")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _worthwhile_threads(folder: Path, *, available: int) -> int:
    """Threads meet several times a layer: a small model loses more there than it gains, by far on a busy machine."""
    weight_bytes = sum(path.stat().st_size for path in weight_files(folder))
    return min(available, 1 + weight_bytes // BYTES_PER_THREAD)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return _DTYPES[name]


def _allocate(
    settings: WorkerSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> kv_cache.KVCache:
    block_bytes = kv_cache.bytes_per_block(config, settings.block_size, dtype, settings.kv_dtype)
    num_blocks = settings.device_blocks or kv_cache.blocks_that_fit(
        block_bytes,
        device,
        memory_fraction=settings.memory_fraction,
        activation_bytes=_activation_bytes(settings, config, dtype),
    )
    return kv_cache.allocate(
        config, num_blocks, settings.block_size, dtype=dtype, device=device, kv_dtype=settings.kv_dtype
    )


def _kv_name(settings: WorkerSettings, dtype: torch.dtype) -> str:
    """What tells KV from other KV of the same model: in fewer bits it depends on what it was computed in, too. In
    deterministic mode none is taken that was computed without."""
    computed = str(dtype).removeprefix("torch.")
    if settings.deterministic == "on":
        computed += " in fixed order"
    return computed if kv_cache.kv_format(settings.kv_dtype, dtype) is None else f"{settings.kv_dtype} of {computed}"


def _activation_bytes(settings: WorkerSettings, config: ModelConfig, dtype: torch.dtype) -> int:
    """A generous estimate of what the largest step takes beside weights and KV."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    token = (6 * config.hidden_size + 2 * heads + 3 * config.intermediate_size) * dtype.itemsize
    row = config.vocab_size * 4 * 8
    return 2 * (settings.max_batch_tokens * token + settings.max_sequences * row)


def _max_model_len(settings: WorkerSettings, config: ModelConfig, num_blocks: int) -> int:
    """The model's own length, or the pool's where that is less; what the user asks for must fit both.

    A window bounds neither: distances never get longer than it, and blocks that left it are free again.
    """
    room = num_blocks * settings.block_size
    if settings.window:
        kept = settings.window + settings.sinks + 2 * settings.block_size
        if room < kept:
            raise ConfigError(f"--window and --sinks need {kept} token positions of KV and the pool has {room}")
        return settings.max_model_len or ENDLESS
    check_length(settings, config.max_positions)
    if settings.max_model_len > room:
        raise ConfigError(f"--max-model-len {settings.max_model_len} is over the {room} positions of the KV pool")
    return settings.max_model_len or min(config.max_positions, room)
