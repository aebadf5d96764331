"""What a KV cache is worth, measured: time per token with and without one, sequences in the same bytes, bytes by dtype.

Knows the engine and the pool. Invariant: every number comes from a run or from a real allocation.
"""

from __future__ import annotations

import random
import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from bench.chart import Line, line_chart
from bench.engine.alone import OneEngine, decode_steps, one_engine
from bench.engine.scenario import random_ids
from bench.sharing.local_worker import LocalWorker, WorkerShape
from pando.settings import WorkerSettings
from worker.batch import SamplingParams
from worker.model_runner import load_model_runner

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
STEPS = 8
REQUESTS = 400
POOLS = (512, 1024, 2048, 4096)
"""Blocks."""
MAX_LEN = 4096
SEED = 0


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Milliseconds for the next token after `length` tokens."""

    length: int
    with_cache_ms: float
    without_cache_ms: float


@dataclass(frozen=True, slots=True)
class Concurrency:
    """Sequences at once in one pool: paged, while others wait; or if each had `max_len` reserved."""

    kv_tokens: int
    max_len: int
    mean_len: float
    reserved: int
    paged_peak: int
    paged_mean: float


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Of one dtype: bytes of a token in all layers, as allocated."""

    dtype: str
    bytes_per_token: float


def token_times(settings: WorkerSettings, lengths: Sequence[int] = LENGTHS) -> list[TokenTimes]:
    """With a cache the next token is a decode step; without, the whole text so far is computed again."""
    blocks = -(-(max(lengths) + 64) // settings.block_size)
    with one_engine(replace(settings, device_blocks=blocks, max_sequences=1)) as engine:
        return [TokenTimes(length, _with(engine, length), _without(engine, length)) for length in lengths]


def _with(engine: OneEngine, length: int) -> float:
    return 1e3 * statistics.median(step.wall_s for step in decode_steps(engine, 1, length, STEPS))


def _without(engine: OneEngine, length: int) -> float:
    vocab_size = engine.runner.spec.vocab_size
    times = []
    for number in range(3):
        engine.submit(random_ids(random.Random(f"{length} {number}"), length, vocab_size), 1)
        times.append(sum(step.wall_s for step in engine.run()))
    return 1e3 * statistics.median(times)


def concurrency(blocks: int, block_size: int = 16, requests: int = REQUESTS) -> Concurrency:
    """The real engine, scheduler and pool with simulated time; lengths are drawn log-uniformly, each prompt is unique.
    Counts are of steps in which requests waited, so that the pool and not the demand was the bound."""
    worker = LocalWorker(
        WorkerShape(num_blocks=blocks, block_size=block_size, reuse=False, max_sequences=4096, max_model_len=MAX_LEN)
    )
    rng = random.Random(SEED)
    lengths = []
    for _ in range(requests):
        total = int(2 ** rng.uniform(6, 12))
        answer = max(1, total // 4)
        ids = array("I", random_ids(rng, total - answer, 2048))
        worker.submit(ids, worker.regions("a"), sampling=SamplingParams(max_tokens=answer))
        lengths.append(total)
    counts = []
    while worker.busy:
        worker.step()
        if worker.scheduler.num_waiting:
            counts.append(worker.scheduler.num_running)
    worker.close()
    return Concurrency(
        kv_tokens=blocks * block_size,
        max_len=MAX_LEN,
        mean_len=statistics.mean(lengths),
        reserved=blocks * block_size // MAX_LEN,
        paged_peak=max(counts),
        paged_mean=statistics.mean(counts),
    )


def kv_bytes(settings: WorkerSettings, blocks: int = 64) -> list[KVBytes]:
    """What each dtype takes, of the dtypes that a worker offers for weights and, where it does, for KV alone."""
    found = []
    for dtype, change in kv_choices().items():
        runner = load_model_runner(replace(settings, device_blocks=blocks, **change))
        found.append(KVBytes(dtype, cache_bytes(runner.cache) / (blocks * settings.block_size)))
        runner.close()
    return found


def kv_choices() -> dict[str, dict[str, Any]]:
    """Settings for each KV dtype by its name, from what the worker's options say."""
    choices: dict[str, dict[str, Any]] = {name: {"dtype": name} for name in ("float32", "bfloat16")}
    for field in fields(WorkerSettings):
        if field.name == "kv_dtype":
            own = [name for name in field.metadata["choices"] if name not in ("same", "auto", *choices)]
            choices |= {name: {"dtype": "bfloat16", "kv_dtype": name} for name in own}
    return choices


def cache_bytes(cache: Any) -> int:
    """Of all memory behind a cache's tensors, views counted once."""
    storages = {}
    for field in fields(cache):
        value = getattr(cache, field.name)
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def draw_times(times: Sequence[TokenTimes], title: str) -> str:
    """Both curves as SVG."""
    lines = [
        Line("without a KV cache: all tokens again", [(one.length, one.without_cache_ms) for one in times]),
        Line("with a KV cache", [(one.length, one.with_cache_ms) for one in times]),
    ]
    return line_chart(lines, title=title, x_label="tokens before it")


def draw_concurrency(found: Sequence[Concurrency]) -> str:
    """Sequences at once over the size of the pool, as SVG."""
    first = found[0]
    title = f"Sequences at once in the same bytes: lengths 64 to {first.max_len:,}, {first.mean_len:,.0f} on average"
    lines = [
        Line("paged, mean of the run", [(one.kv_tokens, one.paged_mean) for one in found]),
        Line(f"{first.max_len:,} positions reserved for each", [(one.kv_tokens, one.reserved) for one in found]),
    ]
    return line_chart(lines, title=title, x_label="token positions in the pool")
