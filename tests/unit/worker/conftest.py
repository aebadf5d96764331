"""A worker without threads, wire or wall clock: scheduler, pool and simulated runner, stepped by hand."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvstore.block_pool import BlockPool
from kvstore.scope import Region, ScopeRoot
from kvstore.tiers import Tiers
from worker.admission import SchedulerLimits
from worker.batch import Batch, SamplingParams
from worker.holdings import Holdings, OwnerQuota, Publishers
from worker.offload import Offload
from worker.runner import ModelSpec, StepInFlight
from worker.scheduler import Scheduler
from worker.sequence import Finish, Fork, SequenceOutput, SequenceRequest
from worker.simulated_runner import SimulatedRunner, StepCost

VOCAB_SIZE = 500
EOS = 2


def spec(
    num_blocks: int = 64, block_size: int = 4, max_model_len: int = 200, window: int | None = None, sinks: int = 0
) -> ModelSpec:
    return ModelSpec("simulated", bytes(16), VOCAB_SIZE, max_model_len, (EOS,), num_blocks, block_size, window, sinks)


@dataclass
class Result:
    """All that came out for one sequence."""

    token_ids: list[int] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, output: SequenceOutput) -> None:
        assert self.finish is None, "an output after the end"
        if output.token_ids and self.outputs:
            assert output.first_index == self.outputs[-1].first_index + len(self.outputs[-1].token_ids)
        self.outputs.append(output)
        self.token_ids += output.token_ids
        self.finish = output.finish


class World:
    """`step` is the engine's, in one place; `batches` keeps what ran. A `runner` of one's own brings its own shape.

    With `overlap` a step that may be decided ahead always is, before the end of the one that runs.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_batch_tokens: int = 64,
        max_sequences: int = 16,
        max_waiting: int = 1000,
        max_model_len: int = 200,
        reuse: bool = True,
        key_bits: int = 128,
        num_cpu_blocks: int = 0,
        window: int | None = None,
        sinks: int = 0,
        runner: Any = None,
        overlap: bool = False,
    ) -> None:
        self.now = 0.0
        self.step_s = 0.001
        self.prefill_tokens_per_s = 10_000.0
        self.runner = runner or SimulatedRunner(
            spec(num_blocks, block_size, max_model_len, window, sinks),
            StepCost(0.001, 0.0001),
            num_cpu_blocks=num_cpu_blocks,
            sleep=self.sleep,
            clock=lambda: self.now,
        )
        shape = self.runner.spec
        # As the CPU tier's, the pool says what became free: tests poison it.
        self.pool = BlockPool(shape.num_blocks, shape.block_size, key_bits=key_bits, reuse=reuse, wipe=True)
        limits = SchedulerLimits(max_batch_tokens, max_sequences, max_waiting, max_model_len, window, sinks)
        self.tiers: Tiers | None = None
        self.offload: Offload | None = None
        if self.runner.mover is not None:
            self.offload = Offload(self.pool, self.runner.mover)
            self.tiers = self.offload.tiers
        self.holdings = Holdings(self.pool, self.tiers)
        self.scheduler = Scheduler(self.pool, limits, holdings=self.holdings, tiers=self.tiers)
        self.batches: list[Batch] = []
        self._overlap = overlap
        self._launched: deque[tuple[Batch, StepInFlight]] = deque()
        self.on_schedule: Callable[[], None] = lambda: None
        """What a test does to memory once a step is decided, before anything of it is done."""
        self.results: dict[int, Result] = {}

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def submit(
        self,
        prompt: Iterable[int],
        *,
        max_tokens: int = 8,
        tenant: str = "a",
        num_prompt_tokens: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        no_store: bool = False,
        regions: tuple[Region, ...] | None = None,
        fork_seeds: tuple[int, ...] = (),
        publishers: Publishers = (),
        quota: OwnerQuota | None = None,
        weight: int = 1,
        **sampling: object,
    ) -> int:
        tokens = array("I", prompt)
        request = SequenceRequest(
            sequence_id=len(self.results),
            token_ids=tokens,
            num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
            regions=regions or (Region(ScopeRoot(tenant.encode().ljust(16, b"-")), None),),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
            priority=priority,
            deadline=deadline,
            no_store=no_store,
            weight=weight,
            forks=tuple(Fork(len(self.results) + 1 + i, seed) for i, seed in enumerate(fork_seeds)),
        )
        self.holdings.admit(request.owner, publishers, quota)
        for sequence_id in (request.sequence_id, *(fork.sequence_id for fork in request.forks)):
            self.results[sequence_id] = Result()
        self.scheduler.submit(request, self.now)
        self._take()
        return request.sequence_id

    def cancel(self, sequence_id: int) -> None:
        self.scheduler.cancel(sequence_id)
        self._take()

    def step(self) -> bool:
        """One turn; whether anything was done. With `overlap` the step behind may be on its way afterwards."""
        if self._overlap:
            return self._step_overlapped()
        batch = self._schedule()
        if batch is not None:
            self.scheduler.complete(batch, self.runner.execute(batch))
        elif self.offload is not None and self.offload.num_moving:
            self._await_move()
            return True
        self._take()
        return batch is not None

    def _step_overlapped(self) -> bool:
        for _ in range(2 - len(self._launched)):
            batch = self._schedule()
            if batch is not None:
                self._launched.append((batch, self.runner.launch(batch)))
        if self._launched:
            batch, step = self._launched.popleft()
            self.scheduler.complete(batch, step.tokens())
            self._take()
            return True
        if self.offload is not None and self.offload.num_moving:
            self._await_move()
            return True
        self._take()
        return False

    def _await_move(self) -> None:
        """A turn in which only copies between the tiers go on: their thread must get to run, or turns run out."""
        time.sleep(1e-4)
        self.now += 0.001

    def _schedule(self) -> Batch | None:
        if self.offload is not None:
            self.offload.answer(
                step_s=self.step_s,
                num_sequences=self.scheduler.num_sequences,
                prefill_tokens_per_s=self.prefill_tokens_per_s,
            )
        batch = self.scheduler.schedule(self.now)
        self.on_schedule()
        if self.offload is not None:
            self.offload.order(idle=batch is None and not self._launched)
        if batch is not None:
            self.batches.append(batch)
        return batch

    def run(self, most_steps: int = 10_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(most_steps):
            if not self.step():
                assert not self.scheduler.num_sequences
                return
        raise AssertionError("no end in sight")

    def tokens(self, prompt: Iterable[int], **how: object) -> list[int]:
        """Run one request to its end."""
        sequence = self.submit(prompt, **how)  # type: ignore[arg-type]
        self.run()
        return self.results[sequence].token_ids

    def assert_nothing_held(self) -> None:
        assert self.pool.num_referenced == 0
        assert self.pool.num_free + self.pool.num_cached == self.pool.num_blocks
        self.pool.check(deep=True)
        if self.tiers is not None:
            assert self.tiers.cpu.num_referenced == self.tiers.num_in_transfer == 0
            self.tiers.check(deep=True)

    def _take(self) -> None:
        for output in self.scheduler.take_outputs():
            self.results[output.sequence_id].take(output)


@pytest.fixture
def world() -> Callable[..., World]:
    """Makes worlds; keywords are those of `World`."""
    return World


@pytest.fixture
def model_spec() -> Callable[..., ModelSpec]:
    """Makes specs of the simulated model; keywords num_blocks, block_size, max_model_len."""
    return spec
