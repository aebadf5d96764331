"""A worker without wire, Redis or threads of its own: engine, scheduler, pool and runner, stepped by the caller.

Knows sequences by number. Time is the wall's with the model, and the simulation's own with the simulated runner; every
count is taken from the batches that ran and from what the engine said.
"""

from __future__ import annotations

import random
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field

from kvstore.block_pool import BlockPool
from kvstore.eviction import SLRU
from kvstore.scope import Region, ScopeRoot, scope_root
from pando.settings import WorkerSettings
from worker.admission import SchedulerLimits
from worker.batch import SamplingParams
from worker.engine import Engine, StepReport
from worker.holdings import Holdings, OwnerQuota, Publishers
from worker.offload import Offload
from worker.runner import ModelSpec, Runner
from worker.scheduler import Scheduler
from worker.sequence import AdmissionFacts, Finish, Fork, SequenceRequest
from worker.simulated_runner import SimulatedRunner, StepCost

VOCAB_SIZE = 2048
FIRST_TOKEN_ID = 16
"""Smaller ids are special ones."""
POLL_S = 0.0005
COST = StepCost(step_s=1e-3, token_s=5e-5)


class SimulatedTime:
    """A clock that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Seconds since the start."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """How big a worker is. `simulated`: its runner and its time are."""

    num_blocks: int
    block_size: int = 16
    cpu_blocks: int = 0
    reuse: bool = True
    policy: str = SLRU
    simulated: bool = True
    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_model_len: int = 8192
    threads: int = 1


@dataclass(slots=True)
class Answer:
    """What came of one sequence. Times are seconds of the worker's clock; `computed` counts positions of its prompt."""

    num_prompt_tokens: int
    sent_at: float
    first_at: float = 0.0
    ended_at: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    computed: int = 0
    facts: AdmissionFacts | None = None

    @property
    def cached(self) -> int:
        """Prompt tokens found in either tier when it was admitted."""
        facts = self.facts
        return facts.cached_device_tokens + facts.cached_cpu_tokens if facts is not None else 0

    @property
    def ttft_s(self) -> float:
        """From sent to the first token."""
        return self.first_at - self.sent_at


class LocalWorker:
    """Submit, then `run` until all is answered. `close` it."""

    def __init__(self, shape: WorkerShape) -> None:
        self.shape = shape
        time_of = SimulatedTime()
        self._clock = time_of.now if shape.simulated else time.monotonic
        self._sleep = time_of.sleep if shape.simulated else time.sleep
        self.runner: Runner = _simulated(shape, time_of) if shape.simulated else _model(shape)
        spec = self.runner.spec
        self.pool = BlockPool(spec.num_blocks, spec.block_size, reuse=shape.reuse, policy=shape.policy)
        offload = Offload(self.pool, self.runner.mover) if self.runner.mover is not None else None
        tiers = offload.tiers if offload is not None else None
        holdings = Holdings(self.pool, tiers)
        limits = SchedulerLimits(shape.max_batch_tokens, shape.max_sequences, 1 << 20, spec.max_model_len)
        self.scheduler = Scheduler(self.pool, limits, holdings=holdings, tiers=tiers)
        self._engine = Engine(
            self.runner, self.pool, self.scheduler, self._on_step, holdings=holdings, offload=offload, clock=self._clock
        )
        self.offload = offload
        self.answers: dict[int, Answer] = {}
        self.steps = 0
        self.copies = 0
        self.peak_blocks = 0
        """Most blocks held when a step was over."""
        self._open: set[int] = set()
        self._next_id = 0

    @property
    def now(self) -> float:
        """Seconds of the worker's clock."""
        return self._clock()

    def root(self, scope_id: str) -> ScopeRoot:
        """The root of a scope on this worker."""
        return scope_root(b"bench", self.runner.spec.fingerprint, scope_id, block_size=self.shape.block_size)

    def regions(self, tenant: str, *, public: int = 0) -> tuple[Region, ...]:
        """A prompt of `tenant` whose first `public` tokens are published to all."""
        head = (Region(self.root("public"), public),) if public else ()
        return (*head, Region(self.root(f"tenant:{tenant}"), None))

    def submit(
        self,
        token_ids: array[int],
        regions: tuple[Region, ...],
        *,
        sampling: SamplingParams,
        fork_seeds: tuple[int, ...] = (),
        publishers: Publishers = (),
        quota: OwnerQuota | None = None,
    ) -> int:
        """The number of the sequence; its forks have the next ones."""
        first = self._next_id
        self._next_id += 1 + len(fork_seeds)
        forks = tuple(Fork(first + 1 + index, seed) for index, seed in enumerate(fork_seeds))
        for number in range(first, self._next_id):
            self.answers[number] = Answer(len(token_ids), self._clock())
            self._open.add(number)
        self._engine.submit(
            SequenceRequest(
                first, token_ids, len(token_ids), regions, sampling, forks=forks, publishers=publishers, quota=quota
            )
        )
        return first

    def run(self) -> None:
        """Step until every sequence has ended."""
        while self.busy:
            self.step()

    @property
    def busy(self) -> bool:
        """Whether a sequence has not ended."""
        return bool(self._open)

    def step(self) -> None:
        """One step of the engine, or a short sleep where there was none to run."""
        if not self._engine.step():
            self._sleep(POLL_S)

    def pause(self, seconds: float) -> None:
        """Nothing is asked for so long; blocks may move between the tiers."""
        until = self._clock() + seconds
        while self._clock() < until:
            self._engine.step()
            self._sleep(POLL_S)

    def warm_up(self) -> None:
        """Run two requests that leave nothing behind, so that libraries are loaded and speeds are known."""
        for length in (16, min(256, self.pool.num_blocks * self.pool.block_size - 2)):
            tokens = array("I", (FIRST_TOKEN_ID + index % 64 for index in range(length)))
            self.submit(tokens, self.regions("warm-up"), sampling=SamplingParams(max_tokens=2))
            self.run()
        self.pool.purge(self.root("tenant:warm-up"))
        self.answers.clear()
        self.steps = self.copies = self.peak_blocks = 0

    def close(self) -> None:
        """Free the model."""
        self.runner.close()

    @property
    def computed(self) -> int:
        """Prompt positions computed, for all sequences together."""
        return sum(answer.computed for answer in self.answers.values())

    @property
    def hit_percent(self) -> float:
        """Prompt tokens found cached at admission, in percent of all."""
        return hit_percent(list(self.answers.values()))

    def _on_step(self, report: StepReport) -> None:
        now = self._clock()
        self.peak_blocks = max(self.peak_blocks, self.pool.num_referenced)
        if report.batch is not None:
            self.steps += 1
            self.copies += len(report.batch.copies)
            for share in report.batch.sequences:
                answer = self.answers[share.sequence_id]
                answer.computed += max(
                    0, min(share.start + len(share.token_ids), answer.num_prompt_tokens) - share.start
                )
        for output in report.outputs:
            answer = self.answers[output.sequence_id]
            answer.facts = output.admission or answer.facts
            if output.token_ids and not answer.token_ids:
                answer.first_at = now
            answer.token_ids += output.token_ids
            if output.finish is not None:
                answer.finish, answer.ended_at = output.finish, now
                self._open.discard(output.sequence_id)
                if output.finish not in (Finish.LENGTH, Finish.STOP):
                    raise RuntimeError(f"a sequence ended by {output.finish.value}: {output.reason}")


def hit_percent(answers: list[Answer]) -> float:
    """Prompt tokens found cached at admission, in percent of all."""
    prompt = sum(answer.num_prompt_tokens for answer in answers)
    return 100.0 * sum(answer.cached for answer in answers) / prompt if prompt else 0.0


def shared_blocks(tables: list[list[int]]) -> tuple[int, int]:
    """Of these block tables: blocks that all have, and blocks that one alone has."""
    counts = Counter(block for table in tables for block in set(table))
    return sum(n == len(tables) for n in counts.values()), sum(n == 1 for n in counts.values())


def random_tokens(rng: random.Random, count: int) -> array[int]:
    """Token ids without special ones."""
    return array("I", rng.choices(range(FIRST_TOKEN_ID, VOCAB_SIZE), k=count))


def _simulated(shape: WorkerShape, time_of: SimulatedTime) -> SimulatedRunner:
    spec = ModelSpec("simulated", bytes(16), VOCAB_SIZE, shape.max_model_len, (), shape.num_blocks, shape.block_size)
    return SimulatedRunner(
        spec,
        COST,
        num_cpu_blocks=shape.cpu_blocks,
        sleep=time_of.sleep,
        clock=time_of.now,
        reserved_token_ids=frozenset(range(FIRST_TOKEN_ID)),
    )


def _model(shape: WorkerShape) -> Runner:
    from worker.model_runner import load_model_runner

    return load_model_runner(
        WorkerSettings(
            model="pando-tiny",
            device="cpu",
            dtype="float32",
            block_size=shape.block_size,
            device_blocks=shape.num_blocks,
            cpu_blocks=shape.cpu_blocks,
            max_batch_tokens=shape.max_batch_tokens,
            max_sequences=shape.max_sequences,
            threads=shape.threads,
        )
    )
