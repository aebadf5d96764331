"""The runner that computes: a decoder, its KV cache and a sampler behind the `Runner` face.

Knows batches; nothing of queues, tenants, block keys or the wire, and needs neither Ray, Redis nor gRPC. Invariant:
what a step computes for a sequence depends on that sequence's tokens alone, whatever else is in the batch.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import kernels
from pando.errors import ConfigError
from pando.model_folder import resolve_model
from pando.settings import WorkerSettings
from worker import kv_cache, sampler
from worker.batch import Batch, BlockCopy, SamplingParams, ScheduledSequence
from worker.checks import check_kv, check_length
from worker.cpu_tier import CpuTier
from worker.models.config import ModelConfig, read_config, with_window
from worker.models.decoder import Decoder, load_decoder
from worker.runner import ModelSpec
from worker.sampler import Draw
from worker.weights import Checkpoint, fingerprint, weight_files

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# One more CPU thread for so many bytes of weights.
BYTES_PER_THREAD = 64 * 1024 * 1024

# The longest sequence where attention has a window: rotary angles stay exact far beyond it.
ENDLESS = 1 << 30

Ints = npt.NDArray[np.int64]


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
    if device.type == "cpu":
        torch.set_num_threads(settings.threads or _worthwhile_threads(folder, available=_cores()))
    with torch.inference_mode(), Checkpoint(folder, device=device, dtype=dtype) as checkpoint:
        decoder = load_decoder(config, checkpoint, partial(kernels.pack, deterministic=deterministic))
    cache = _allocate(settings, config, dtype, device)
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
        self._decoder: Decoder | None = decoder
        self._cache: kv_cache.KVCache | None = cache
        self._device = cache.blocks.device
        self._deterministic = deterministic
        config = decoder.config
        self._windows = tuple(dict.fromkeys(config.windows))
        self._sinks = {} if config.sink_window is None else {config.sink_window: config.sinks}

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[int]:
        """Run the step; one token id for each sequence that has `sampling`, in batch order."""
        inputs = self._inputs(batch)
        draws, rows = _draws(batch, inputs)
        hidden = self._hidden(batch, inputs, rows)
        if not draws:
            return []
        return sampler.choose(self.decoder.logits(hidden), draws)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Run the step and return the logits after every token of it, `[num_tokens, vocab_size]` float32 on the CPU:
        for tests and for perplexity; nothing is sampled."""
        hidden = self._hidden(batch, self._inputs(batch), None)
        return self.decoder.logits(hidden).cpu()

    def close(self) -> None:
        """Free weights and cache, CPU memory too. The runner must not be used after."""
        if self.mover is not None:
            self.mover.close()
        self._decoder = None
        self._cache = None
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

    def _hidden(self, batch: Batch, inputs: _Inputs, rows: Ints | None) -> torch.Tensor:
        cache = self.cache
        if self.mover is not None:
            self.mover.before_writes(_written(batch, self.spec.block_size))
        for copies in _independent(batch.copies):
            self._copy(cache, copies)
        plan = kernels.plan_attention(
            cache.whole,
            inputs.query_lens,
            inputs.context_lens,
            inputs.block_tables,
            num_heads=self.decoder.config.num_heads,
            windows=self._windows,
            sinks=self._sinks,
            deterministic=self._deterministic,
        )
        return self.decoder.hidden(
            self._tensor(inputs.token_ids),
            self._tensor(inputs.positions),
            cache.layers,
            plan,
            None if rows is None else self._tensor(rows),
        )

    def _copy(self, cache: kv_cache.KVCache, copies: Sequence[BlockCopy]) -> None:
        pairs = self._tensor(np.array([(copy.source, copy.target) for copy in copies], dtype=np.int64))
        kernels.copy_blocks(cache.blocks, pairs[:, 0], pairs[:, 1])

    def _inputs(self, batch: Batch) -> _Inputs:
        """All index arrays of a step, each made in one go."""
        sequences = batch.sequences
        token_ids = np.concatenate([np.asarray(sequence.token_ids) for sequence in sequences]).astype(np.int64)
        query_lens = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
        starts = np.array([sequence.start for sequence in sequences], dtype=np.int64)
        context_lens = starts + query_lens
        query_ends = np.cumsum(query_lens)
        widths = (-(-context_lens // self.spec.block_size)).tolist()
        block_tables = np.full((len(sequences), max(widths)), -1, dtype=np.int64)
        for row, (sequence, width) in enumerate(zip(sequences, widths, strict=True)):
            sinks, first = self._read_blocks(sequence.start)
            if first > sinks:
                block_tables[row, :sinks] = sequence.block_ids[:sinks]
            else:
                first = 0
            block_tables[row, first:width] = sequence.block_ids[first:width]
        return _Inputs(
            token_ids=token_ids,
            positions=np.arange(len(token_ids)) + np.repeat(starts - query_ends + query_lens, query_lens),
            query_lens=query_lens,
            query_ends=query_ends,
            context_lens=context_lens,
            block_tables=block_tables,
        )

    def _read_blocks(self, start: int) -> tuple[int, int]:
        """A step from position `start` on reads so many first blocks, and those from the second number on."""
        spec = self.spec
        first = 0 if spec.window is None else max(0, start - spec.window + 1) // spec.block_size
        return -(-spec.sinks // spec.block_size), first

    def _tensor(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A batch as arrays; tokens of all sequences packed in order."""

    token_ids: Ints  # [num_tokens]
    positions: Ints  # [num_tokens]
    query_lens: Ints  # [num_seqs]
    query_ends: Ints  # [num_seqs], of num_tokens
    context_lens: Ints  # [num_seqs]
    block_tables: Ints  # [num_seqs, max_blocks]


def _draws(batch: Batch, inputs: _Inputs) -> tuple[list[Draw], Ints]:
    """What to sample, and after which of the packed tokens."""
    draws: list[Draw] = []
    rows: list[int] = []
    for sequence, end in zip(batch.sequences, inputs.query_ends.tolist(), strict=True):
        position = sequence.start + len(sequence.token_ids)
        for sampling in sequence.draws:
            draws.append(Draw(sampling, position, sequence.banned_token_ids))
            rows.append(end - 1)
    return draws, np.array(rows, dtype=np.int64)


def _written(batch: Batch, block_size: int) -> Iterator[int]:
    """The blocks that the step writes."""
    yield from (copy.target for copy in batch.copies)
    for sequence in batch.sequences:
        last = sequence.start + len(sequence.token_ids) - 1
        yield from sequence.block_ids[sequence.start // block_size : last // block_size + 1]


def _independent(copies: Sequence[BlockCopy]) -> Iterator[list[BlockCopy]]:
    """Copies in order, in runs of which none reads what one before it writes, or writes what one before it writes."""
    run: list[BlockCopy] = []
    targets: set[int] = set()
    for copy in copies:
        if copy.source in targets or copy.target in targets:
            yield run
            run, targets = [], set()
        run.append(copy)
        targets.add(copy.target)
    if run:
        yield run


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
