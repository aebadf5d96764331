"""The engine: one thread that turns requests into tokens, `step() = schedule, run, finish`.

Knows no wire and no asyncio: work comes in through one queue and leaves by one callback a step. Only this thread
touches scheduler, pool and runner; a step that fails ends its own sequences, a broken invariant ends the engine. With
`overlap` the next step is scheduled and launched while one runs, and that one is finished while the next one runs.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from kvstore.block_pool import BlockPool
from kvstore.events import Event
from kvstore.scope import Region, ScopeRoot
from kvstore.tiers import TierCounts
from pando.errors import ConfigError
from worker.batch import Batch, SamplingParams
from worker.engine_work import Call, Cancel, Drain, Stop, Unpin, Work, WorkQueue
from worker.holdings import Holdings, PinRequest, PurgeCount
from worker.launched_steps import LaunchedSteps
from worker.offload import MOVING_INTERVAL_S, Offload
from worker.runner import Runner
from worker.scheduler import Scheduler
from worker.sequence import SequenceOutput, SequenceRequest
from worker.step_rates import StepRates

logger = logging.getLogger(__name__)

LOAD_INTERVAL_S = 0.1
CHECK_INTERVAL_S = 1.0
WARM_UP_ID = -1
WARM_UP_TOKENS = 256

Clock = Callable[[], float]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the worker is. `queued_tokens`: not yet computed; `prefill_tokens_per_s`, `step_ms`: moving averages."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    device_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    step_ms: float = 0.0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class StepReport:
    """All that one step has to say; `batch` is None when nothing ran, `load` when it was said a moment ago, `moved`
    without a CPU tier. `moved` goes on counting: read it at once."""

    outputs: list[SequenceOutput]
    events: list[Event]
    load: Load | None
    batch: Batch | None
    seconds: float
    num_preemptions: int
    moved: TierCounts | None = None
    num_discarded_tokens: int = 0
    """Since the start: computed for sequences that had ended."""


OnStep = Callable[[StepReport], None]


class Engine:
    """`submit`, `cancel`, `drain` and `stop` may be called from any thread; the rest belongs to the engine's own."""

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        scheduler: Scheduler,
        on_step: OnStep,
        *,
        holdings: Holdings | None = None,
        offload: Offload | None = None,
        on_broken: Callable[[], None] = lambda: None,
        overlap: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self.clock = clock
        self._runner = runner
        self._pool = pool
        self._scheduler = scheduler
        self._holdings = holdings or Holdings(pool)
        self._offload = offload
        self._store = pool if offload is None else offload.tiers
        self._on_step = on_step
        self._on_broken = on_broken
        self._work = WorkQueue()
        self._steps = LaunchedSteps(runner, clock, overlap=overlap)
        self._load_at = float("-inf")
        self._checked_at = clock()
        self._stopping = False
        self._warm = threading.Event()
        self._failed = False
        self._over = False
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        """Start the thread; returns when a first step has shown that the runner works, `ConfigError` if it does not."""
        self._thread.start()
        self._warm.wait()
        if self._failed:
            raise ConfigError("the runner failed its first step; the log has the cause")

    def submit(self, request: SequenceRequest) -> None:
        """Take a request; everything about it comes back by `on_step`."""
        self._work.put(request)

    def cancel(self, sequence_id: int) -> None:
        """End a sequence before the next step; no-op for one that has ended."""
        self._work.put(Cancel(sequence_id))

    def pin(self, request: PinRequest) -> None:
        """Keep a published prefix, as far as it is cached."""
        self._work.put(request)

    def unpin(self, name: str) -> None:
        """Give up a pin; no-op for one that is over."""
        self._work.put(Unpin(name))

    def purge(self, roots: Iterable[ScopeRoot]) -> Future[PurgeCount]:
        """Forget all blocks of these owners and end their sequences. The answer may be `EngineStopped`."""
        owners = frozenset(roots)
        return self.call(lambda: self._purge(owners))

    def call(self, work: Callable[[], R]) -> Future[R]:
        """Do something with what is the engine thread's, between two steps. The answer may be `EngineStopped`; what
        `work` raises ends the engine."""
        call = Call(work)
        self._work.put(call)
        if self._over:
            self._work.refuse_calls()
        return call.answer

    def drain(self) -> None:
        """Reject requests from now on; those taken before go on."""
        self._work.put(Drain())

    def stop(self) -> None:
        """End the thread after the present step; what still runs ends as failed. Idempotent."""
        self._work.put(Stop())
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    # The step

    def step(self) -> bool:
        """Take queued work, then schedule, run, finish; whether a batch ran."""
        if not self._steps and not self._launch_next():
            self._finish(None, 0.0)
            return False
        if self._steps.wait_until_late():
            self._launch_next()
        self._end_oldest()
        return True

    def _launch_next(self) -> bool:
        """Schedule the next step, as far as it can be known now, and launch it; whether there is one."""
        self._take_queued()
        if self._work.holds_call:
            return False
        self._holdings.expire(self.clock())
        if self._offload is not None:
            self._offload.answer(
                step_s=self.rates.step_ms / 1e3,
                num_sequences=self._scheduler.num_sequences,
                prefill_tokens_per_s=self.rates.prefill_tokens_per_s,
            )
        batch = self._scheduler.schedule(self.clock())
        if self._offload is not None:
            self._offload.order(idle=batch is None and not self._steps)
        if batch is not None:
            self._steps.launch(batch)
        return batch is not None

    def _end_oldest(self) -> None:
        """Wait for the oldest step and take it over. A failing one fails its sequences and nobody else's."""
        step = self._steps.take_oldest()
        if step.token_ids is not None:
            self._scheduler.complete(step.batch, step.token_ids)
        else:
            self._scheduler.fail(step.batch, "RUNNER_ERROR")
        self._finish(step.batch, step.seconds)

    def _finish(self, batch: Batch | None, seconds: float) -> None:
        outputs = self._scheduler.take_outputs()
        events = self._store.take_events()
        load = self._load_if_due()
        if batch is not None or outputs or events or load is not None:
            scheduler, moved = self._scheduler, self._offload.counts if self._offload is not None else None
            counts = scheduler.num_preemptions, moved, scheduler.num_discarded_tokens
            self._on_step(StepReport(outputs, events, load, batch, seconds, *counts))

    @property
    def rates(self) -> StepRates:
        """How fast the worker is."""
        return self._steps.rates

    def _load_if_due(self) -> Load | None:
        now = self.clock()
        if now - self._load_at < LOAD_INTERVAL_S:
            return None
        self._load_at = now
        return self.load()

    def admit(self, request: SequenceRequest) -> None:
        """Say who pays for a request's blocks, before the first is taken; engine thread only."""
        self._holdings.admit(request.owner, request.publishers, request.quota)

    def load(self) -> Load:
        """The worker's load now; engine thread only."""
        return Load(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            queued_tokens=self._scheduler.num_queued_tokens,
            free_blocks=self._pool.num_free,
            cached_blocks=self._pool.num_cached,
            device_blocks=self._pool.num_blocks,
            prefill_tokens_per_s=self.rates.prefill_tokens_per_s,
            step_ms=self.rates.step_ms,
            draining=self._scheduler.draining,
        )

    # Work

    def _take_queued(self) -> None:
        """All there is; but calls, which are done between two steps, when no step is on its way."""
        while (work := self._work.get(calls=not self._steps)) is not None:
            self._take(work)

    def _take(self, work: Work) -> None:
        match work:
            case SequenceRequest():
                self.admit(work)
                self._scheduler.submit(work, self.clock())
            case Cancel():
                self._scheduler.cancel(work.sequence_id)
            case PinRequest():
                self._holdings.pin(work, self.clock())
            case Unpin():
                self._holdings.unpin(work.name)
            case Call():
                work.run()
            case Drain():
                self._scheduler.draining = True
            case Stop():
                self._stopping = True

    def _purge(self, owners: frozenset[ScopeRoot]) -> PurgeCount:
        self._scheduler.cancel_owners(owners)
        return self._holdings.purge(owners)

    # The thread

    def _live(self) -> None:
        try:
            self._warm_up()
            self._warm.set()
            while not self._stopping:
                if not self._scheduler.num_sequences and not self._steps:
                    self._idle()
                if not self.step() and self._scheduler.num_sequences:
                    self._pause(MOVING_INTERVAL_S)
            while self._steps:
                self._end_oldest()
            self._scheduler.fail_all("WORKER_STOPPED")
            self._finish(None, 0.0)
        except Exception:  # the end of the thread: a broken invariant stops the worker
            logger.exception("the engine is broken and stops")
            self._break_down()
        finally:
            self._over = True
            self._work.refuse_calls()

    def _idle(self) -> None:
        """Sleep until there is work, after the last load is said and the pool has been looked over."""
        if self._pause(max(0.0, self._load_at + LOAD_INTERVAL_S - self.clock())):
            return
        self._finish(None, 0.0)
        if self.clock() - self._checked_at >= CHECK_INTERVAL_S:
            self._store.check()
            self._checked_at = self.clock()
        if self._offload is not None and self._offload.num_moving:
            self._pause(MOVING_INTERVAL_S)
        else:
            self._pause(CHECK_INTERVAL_S if self._holdings.num_pins else None)

    def _pause(self, seconds: float | None) -> bool:
        """Sleep until there is work, so long at most; whether some was taken."""
        work = self._work.get(seconds)
        if work is not None:
            self._take(work)
        return work is not None

    def _break_down(self) -> None:
        """Fail what is there without touching the pool, which cannot be trusted any more."""
        self._failed = True
        self._scheduler.abandon("WORKER_STOPPED")
        outputs = self._scheduler.take_outputs()
        scheduler = self._scheduler
        discarded = scheduler.num_discarded_tokens
        self._on_step(StepReport(outputs, [], None, None, 0.0, scheduler.num_preemptions, None, discarded))
        self._warm.set()
        self._on_broken()

    def _warm_up(self) -> None:
        """Run made-up requests, unseen: libraries load before the first real one, and the rates start measured."""
        spec = self._runner.spec
        room = min(spec.max_model_len, spec.num_blocks * spec.block_size) - 2
        for num_tokens in (16, WARM_UP_TOKENS):
            self._steps.rates = StepRates()
            if min(num_tokens, room) > 0:
                self._scheduler.submit(_made_up(min(num_tokens, room), spec.vocab_size), self.clock())
            while (batch := self._scheduler.schedule(self.clock())) is not None:
                self._steps.launch(batch)
                step = self._steps.take_oldest()
                if step.token_ids is None:
                    raise RuntimeError("a made-up request failed")
                self._scheduler.complete(batch, step.token_ids)
            self._scheduler.take_outputs()


def _made_up(num_tokens: int, vocab_size: int) -> SequenceRequest:
    return SequenceRequest(
        sequence_id=WARM_UP_ID,
        token_ids=array("I", (position % vocab_size for position in range(num_tokens))),
        num_prompt_tokens=num_tokens,
        regions=(Region(ScopeRoot(bytes(16)), None),),
        sampling=SamplingParams(max_tokens=2),
        no_store=True,
    )
