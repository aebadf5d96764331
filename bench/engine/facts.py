"""What a KV cache is worth, measured: time per token with and without one, sequences in the same bytes, bytes by dtype.

Knows the engine and the pool. Invariant: every number comes from a run, a count in the real pool or a real allocation;
only what other ways to reserve memory would hold is worked out, from the same requests.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import torch

from bench.engine.alone import OneEngine, one_engine
from bench.engine.checkpoints import ModelShape
from bench.engine.scenario import random_ids
from bench.sharing.local_worker import VOCAB_SIZE, LocalWorker, WorkerShape
from bench.simulate.trace import read_trace
from pando.settings import WorkerSettings
from worker.batch import SamplingParams
from worker.kv_cache import allocate
from worker.models.config import ModelConfig, read_config

LENGTHS = (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
ROUNDS = 7
STEPS = 8
"""Tokens decoded behind each context in each round."""
REQUESTS = 400
TRACE_REQUESTS = 200
ROOMS = (2, 4, 8, 16)
"""Sizes of a pool, in longest requests."""
SHORTEST, LONGEST = 64, 4096
BLOCK_SIZE = 16
KV_DTYPES = ("float32", "bfloat16", "int8", "fp8", "int4")
KV_BLOCKS = 64
SEED = 0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Milliseconds:
    """Of some rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """For the next token after `length` tokens; `ratio` is the median of those of each round."""

    length: int
    cached: Milliseconds
    uncached: Milliseconds
    ratio: float


def token_times(
    settings: WorkerSettings, lengths: Sequence[int] = LENGTHS, *, rounds: int = ROUNDS, say: Say = print
) -> list[TokenTimes]:
    """With a cache the next token is a decode step; without, the whole text so far is computed again, which is what a
    prompt of that length takes to its first token. Both are of the same sequence, and lengths take turns."""
    blocks = -(-(max(lengths) + STEPS + 2) // settings.block_size)
    found: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
    with one_engine(replace(settings, device_blocks=blocks, max_sequences=1)) as engine:
        for length in (min(lengths), max(lengths)):
            _one_sequence(engine, length, "warm-up")
        for number in range(rounds):
            for length in lengths:
                found[length].append(_one_sequence(engine, length, str(number)))
            say(f"time per token: round {number + 1} of {rounds}")
    return [_token_times(length, pairs) for length, pairs in found.items()]


def _one_sequence(engine: OneEngine, length: int, name: str) -> tuple[float, float]:
    """Seconds of a decode step, the median, and of the prompt."""
    rng = random.Random(f"{length} {name}")
    engine.submit(random_ids(rng, length, engine.runner.spec.vocab_size), STEPS + 1)
    computed, prompt_s = 0, 0.0
    decodes = []
    for step in engine.run():
        if computed < length:
            computed, prompt_s = computed + step.tokens, prompt_s + step.wall_s
        else:
            decodes.append(step.wall_s)
    return statistics.median(decodes), prompt_s


def _token_times(length: int, pairs: Sequence[tuple[float, float]]) -> TokenTimes:
    cached, uncached = zip(*pairs, strict=True)
    ratio = statistics.median(without / with_it for with_it, without in pairs)
    return TokenTimes(length, _milliseconds(cached), _milliseconds(uncached), ratio)


def _milliseconds(seconds: Sequence[float]) -> Milliseconds:
    return Milliseconds(1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds))


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in order, each its prompt and the length of its answer. All wait from the start."""

    name: str
    requests: tuple[tuple[array[int], int], ...]
    alike: bool
    """Whether any prompts begin alike."""

    @property
    def lengths(self) -> list[int]:
        """Prompt and answer of each, in tokens."""
        return [len(ids) + answer for ids, answer in self.requests]


@dataclass(frozen=True, slots=True)
class Concurrency:
    """Sequences at once in one pool of `positions` while others wait: the mean of all such steps.

    `reserved`: the longest length for each. `known`: its own final length for each, were it known before. `paged`: the
    real pool, no prefix shared; `shared`: prefixes that are the same shared, where there
    are any.
    """

    positions: int
    reserved: float
    known: float
    paged: float
    shared: float | None


def drawn_load(requests: int = REQUESTS) -> Load:
    """Lengths are drawn log-uniformly, a quarter of each is answer, and no two prompts begin alike."""
    rng = random.Random(SEED)
    made = []
    for _ in range(requests):
        total = int(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
        answer = max(1, total // 4)
        made.append((array("I", random_ids(rng, total - answer, VOCAB_SIZE)), answer))
    return Load(f"drawn, {SHORTEST} to {LONGEST:,} tokens", tuple(made), alike=False)


def trace_load(path: Path, block_size: int, requests: int = TRACE_REQUESTS) -> Load:
    """The first requests of a trace, at their full lengths. Raises `ConfigError` for a file that is none."""
    trace = read_trace(path, block_size, block_size, requests)
    made = tuple((trace.tokens(request), request.answer) for request in trace.requests)
    return Load(path.name.split(".")[0], made, alike=True)


def load_facts(load: Load, *, say: Say = print) -> dict[str, Any]:
    """What there is to say of a load, and its sequences at once."""
    return {
        "name": load.name,
        "requests": len(load.requests),
        "mean": statistics.mean(load.lengths),
        "longest": max(load.lengths),
        "pools": [asdict(one) for one in concurrency(load, say=say)],
    }


def concurrency(load: Load, *, say: Say = print) -> list[Concurrency]:
    """In pools of several sizes."""
    lengths = [(length, answer) for length, (_, answer) in zip(load.lengths, load.requests, strict=True)]
    longest = max(load.lengths)
    found = []
    for room in ROOMS:
        positions = -(-longest // BLOCK_SIZE) * BLOCK_SIZE * room
        paged = paged_mean(load, positions // BLOCK_SIZE, reuse=False)
        shared = paged_mean(load, positions // BLOCK_SIZE, reuse=True) if load.alike else None
        reserved = reserved_mean([(longest, answer) for _, answer in lengths], positions)
        found.append(Concurrency(positions, reserved, reserved_mean(lengths, positions), paged, shared))
        say(f"sequences at once, {load.name}: {positions:,} positions")
    return found


def reserved_mean(requests: Sequence[tuple[int, int]], positions: int) -> float:
    """Sequences at once, weighed by time while others wait, where each (positions, steps) holds its positions from its
    start for so many steps, and they begin in order as soon as there is room."""
    ends: list[tuple[int, int]] = []
    free, now, weighed = positions, 0, 0
    for needed, steps in requests:
        while free < needed:
            end, given_back = ends[0]
            weighed += len(ends) * (end - now)
            now, free = end, free + given_back
            heappop(ends)
        free -= needed
        heappush(ends, (now + steps, needed))
    return weighed / now if now else float(len(ends))


def paged_mean(load: Load, blocks: int, *, reuse: bool) -> float:
    """The real engine, scheduler and pool over the simulated runner. A step may compute any prompt whole, so that the
    pool alone is the bound; counted are steps in which requests wait."""
    everything = sum(load.lengths)
    worker = LocalWorker(
        WorkerShape(
            num_blocks=blocks,
            block_size=BLOCK_SIZE,
            reuse=reuse,
            max_batch_tokens=everything,
            max_sequences=len(load.requests),
            max_model_len=max(load.lengths) + 1,
        )
    )
    for ids, answer in load.requests:
        worker.submit(ids, worker.regions("a"), sampling=SamplingParams(max_tokens=answer))
    counts = []
    before = len(load.requests)
    while worker.busy:
        worker.step()
        left = worker.scheduler.num_sequences
        if worker.scheduler.num_waiting:
            counts.append(worker.scheduler.num_running + before - left)  # with those whose last step it was
        before = left
    worker.close()
    return statistics.mean(counts) if counts else float(len(load.requests))


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Of one dtype: bytes of a token in all layers, scales included, as allocated."""

    dtype: str
    bytes_per_token: float


def kv_bytes(config: ModelConfig) -> list[KVBytes]:
    """What each dtype takes in a pool that the worker's own code allocates, for a model computed in bfloat16."""
    found = []
    for name in KV_DTYPES:
        computed = torch.bfloat16
        cache = allocate(config, KV_BLOCKS, BLOCK_SIZE, dtype=computed, device=torch.device("cpu"), kv_dtype=name)
        found.append(KVBytes(name, cache.blocks.untyped_storage().nbytes() / (KV_BLOCKS * BLOCK_SIZE)))
    return found


def shape_config(shape: ModelShape) -> ModelConfig:
    """As a worker reads it, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape.config()), "utf-8")
        return read_config(Path(folder))
