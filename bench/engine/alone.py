"""The engine alone, in this process: prefill, decode at several batch sizes beside the bandwidth bound, host time.

Knows the engine and its runner, no wire. Invariant: what is called decode is a step in which every sequence of the
batch got one token and nothing else ran.
"""

from __future__ import annotations

import random
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from bench.engine.machine import Machine
from bench.engine.scenario import PREFILL_TOKENS, random_ids
from kvstore.block_pool import BlockPool
from kvstore.scope import Region, scope_root
from pando.settings import WorkerSettings
from worker.admission import SchedulerLimits
from worker.batch import SamplingParams
from worker.engine import Engine, StepReport
from worker.kv_cache import bytes_per_block
from worker.model_runner import ModelRunner, load_model_runner
from worker.models.config import ModelConfig
from worker.scheduler import Scheduler
from worker.sequence import Finish, SequenceRequest

DECODE_CONTEXT = 256
DECODE_STEPS = 32
BATCHES = (1, 8, 16, 64)
PREFILL_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: `wall_s` all of it, `run_s` the part in the runner. `decoding` of its sequences computed one
    token."""

    wall_s: float
    run_s: float
    sequences: int
    tokens: int
    decoding: int


class OneEngine:
    """An engine that the caller steps. `close` it."""

    def __init__(self, settings: WorkerSettings, runner: Any = None, *, reuse: bool = False) -> None:
        """`runner`: of another engine that rests meanwhile, of a model or simulated."""
        self.runner: ModelRunner = runner or load_model_runner(settings)
        spec = self.runner.spec
        self.pool = BlockPool(spec.num_blocks, spec.block_size, reuse=reuse)
        limits = SchedulerLimits(settings.max_batch_tokens, settings.max_sequences, 1 << 20, spec.max_model_len)
        scheduler, overlap = Scheduler(self.pool, limits), settings.overlap == "on"
        self._engine = Engine(self.runner, self.pool, scheduler, self._on_step, overlap=overlap)
        self._reports: list[StepReport] = []
        self._open = 0
        self._next_id = 0

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.runner.decoder.config

    @property
    def num_open(self) -> int:
        """Sequences submitted and not yet ended."""
        return self._open

    def submit(self, token_ids: Sequence[int], output_tokens: int, *, owner: str = "engine") -> None:
        """Queue a prompt; greedy, to the full number of output tokens. It may reuse what `owner` computed."""
        spec = self.runner.spec
        root = scope_root(b"bench", spec.fingerprint, owner, block_size=spec.block_size)
        sampling = SamplingParams(max_tokens=output_tokens)  # no stop token: to the full length
        self._open += 1
        self._next_id += 1
        ids = array("I", token_ids)
        self._engine.submit(SequenceRequest(self._next_id, ids, len(ids), (Region(root, None),), sampling))

    def run(self) -> Iterator[Step]:
        """Step until all that was submitted has ended."""
        while self._open:
            self._reports.clear()
            began = time.perf_counter()
            self._engine.step()
            wall_s = time.perf_counter() - began
            for report in self._reports:
                if report.batch is not None:
                    counts = [len(share.token_ids) for share in report.batch.sequences]
                    yield Step(wall_s, report.seconds, len(counts), sum(counts), counts.count(1))

    def close(self) -> None:
        """Free the model."""
        self.runner.close()

    def _on_step(self, report: StepReport) -> None:
        self._reports.append(report)
        for output in report.outputs:
            if output.finish is not None:
                self._open -= 1
                if output.finish is not Finish.LENGTH:
                    raise RuntimeError(f"a sequence ended by {output.finish.value}: {output.reason}")


@contextmanager
def one_engine(settings: WorkerSettings, *, reuse: bool = False) -> Iterator[OneEngine]:
    """An engine, warmed up, closed at the end."""
    engine = OneEngine(settings, reuse=reuse)
    try:
        engine.submit(range(300, 316), 4)
        list(engine.run())
        yield engine
    finally:
        engine.close()


@dataclass(frozen=True, slots=True)
class DecodeFigures:
    """At one batch size. `bound_tokens_per_s`: if a step only read weights and KV once, at the machine's rate."""

    batch: int
    tokens_per_s: float
    bound_tokens_per_s: float
    host_us: float


@dataclass(frozen=True, slots=True)
class AloneFigures:
    """`mfu`: operations of the prefill over what the machine's matmul does in the same time."""

    prefill_tokens_per_s: float
    mfu: float
    decode: tuple[DecodeFigures, ...]


def measure_alone(settings: WorkerSettings, machine: Machine, batches: Sequence[int] = BATCHES) -> AloneFigures:
    """All figures of one model in one dtype on one device."""
    room = max(max(batches) * (DECODE_CONTEXT + DECODE_STEPS + settings.block_size), PREFILL_TOKENS + 64)
    blocks = -(-room // settings.block_size) + len(batches)
    with one_engine(replace(settings, device_blocks=blocks, max_sequences=max(batches))) as engine:
        rate = statistics.median(prefill_rate(engine, PREFILL_TOKENS, number) for number in range(PREFILL_REPEATS))
        mfu = rate * prefill_flop(engine.config, PREFILL_TOKENS) / PREFILL_TOKENS / (machine.matmul_gflop_s * 1e9)
        decode = tuple(_decode(engine, batch, settings.block_size, machine) for batch in batches)
    return AloneFigures(rate, mfu, decode)


def prefill_rate(engine: OneEngine, tokens: int, number: int) -> float:
    """Prompt tokens a second of one prompt, to its first output token."""
    engine.submit(random_ids(random.Random(f"prefill {number}"), tokens, engine.runner.spec.vocab_size), 1)
    return tokens / sum(step.wall_s for step in engine.run())


def decode_steps(engine: OneEngine, batch: int, context: int, steps: int) -> list[Step]:
    """The steps in which each of `batch` sequences decodes, from `context` tokens on."""
    rng = random.Random(f"decode {batch} {context}")
    for _ in range(batch):
        engine.submit(random_ids(rng, context, engine.runner.spec.vocab_size), steps + 1)
    # Prompts of a large batch do not end in one step, so that not all sequences decode in all of the steps.
    return [step for step in engine.run() if step.sequences == step.tokens == batch]


def prefill_flop(config: ModelConfig, tokens: int) -> float:
    """Operations of one prompt: matrices of all layers for each token, attention over what is before it, one head."""
    heads = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    attention = 4 * heads * tokens * (tokens + 1) / 2
    return config.num_layers * (2.0 * layer * tokens + attention) + 2.0 * config.vocab_size * config.hidden_size


def step_bytes(config: ModelConfig, itemsize: int, batch: int, context: int, kv_token_bytes: float) -> float:
    """Read by a decode step: all matrices and the head once, and each sequence's KV."""
    heads = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    weights = (config.num_layers * layer + config.vocab_size * config.hidden_size) * itemsize
    return weights + batch * context * kv_token_bytes


def _decode(engine: OneEngine, batch: int, block_size: int, machine: Machine) -> DecodeFigures:
    steps = decode_steps(engine, batch, DECODE_CONTEXT, DECODE_STEPS)
    seconds = statistics.median(step.wall_s for step in steps)
    host_us = statistics.median(step.wall_s - step.run_s for step in steps) * 1e6
    blocks = engine.runner.cache.blocks
    kv_token = bytes_per_block(engine.config, block_size, blocks.dtype) / block_size
    read = step_bytes(engine.config, blocks.dtype.itemsize, batch, DECODE_CONTEXT + DECODE_STEPS // 2, kv_token)
    return DecodeFigures(batch, batch / seconds, batch * machine.read_gb_s * 1e9 / read, host_us)
