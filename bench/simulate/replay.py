"""Replays a trace over a fleet: one queue of things to come, in order of time, and what came of each request.

Knows what happens when, and decides nothing. Invariant: whatever a step changed is heard of after the step has ended
and the wire's delay has passed, so nobody knows the future.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from bench.simulate.baselines import ONE_POOL, POLICIES
from bench.simulate.exchange import Exchange
from bench.simulate.replica import ROOT, Replica, ReplicaShape
from bench.simulate.routers import SimulatedRouter
from bench.simulate.trace import Trace, TraceRequest
from kvstore.block import BlockKey, WorkerId
from kvstore.block_key import block_keys
from kvstore.events import Event
from kvstore.index import CachedPrefix
from kvstore.memory_index import MemoryIndex
from kvstore.scope import Region
from router.placement import Prompt
from worker.engine import LOAD_INTERVAL_S, Load, StepReport
from worker.sequence import SequenceOutput
from worker.simulated_runner import StepCost

POLL_S = 0.005
"""How often a worker whose sequences all wait looks again."""

Say = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class FleetShape:
    """What is simulated. Tokens are the trace's; `load`: of the fleet without a hit, which sets the prefill rate."""

    workers: int = 8
    cache_fraction: float = 0.3
    routers: int = 1
    load: float = 0.9
    step_s: float = 1e-3
    batch_tokens: int = 512
    max_sequences: int = 64
    event_lag_s: float = 0.010
    link_s: float = 0.0005

    def replica(self, trace: Trace) -> ReplicaShape:
        """Each worker: its part of the cache, but room for the longest request at least."""
        share = int(self.cache_fraction * trace.num_distinct / self.workers)
        rate = trace.prompt / trace.span_s / self.workers / self.load
        return ReplicaShape(
            num_blocks=max(share, trace.longest),
            block_size=trace.units,
            cost=StepCost(self.step_s, 1.0 / rate),
            max_batch_tokens=max(1, int(self.batch_tokens / trace.scale)),
            max_sequences=self.max_sequences,
            max_model_len=trace.longest * trace.units,
        )


@dataclass(slots=True)
class Fate:
    """What came of one request. Times are of the replay's clock; `ttft_s` is None for one that nobody could take."""

    prompt: int
    arrival_s: float
    ttft_s: float | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a replay: each request's fate, and the seconds that each worker computed."""

    fates: Sequence[Fate]
    busy_s: Sequence[float]
    evictions: int
    seconds: float


@dataclass(slots=True)
class _Place:
    """A replica and when it will be stepped; None while it sleeps."""

    replica: Replica
    due: float | None = None
    load_at: float = field(default=float("-inf"))


class _PoolIndex(MemoryIndex):
    """Of workers over one pool: what is there, all of them have. Kept once, whoever says it."""

    def __init__(self, workers: Iterable[str]) -> None:
        super().__init__()
        self._all = [WorkerId(worker) for worker in workers]

    def apply(self, worker: WorkerId, epoch: int, events: Iterable[Event]) -> None:
        super().apply(self._all[0], epoch, events)

    def match(self, keys: Sequence[BlockKey]) -> dict[WorkerId, CachedPrefix]:
        return {worker: prefix for prefix in super().match(keys).values() for worker in self._all}


class Replay:
    """`run` it once. `policy` is one of `POLICIES`."""

    def __init__(self, trace: Trace, shape: FleetShape, policy: str) -> None:
        self._trace = trace
        self._shape = shape
        self._one_pool = policy == ONE_POOL
        self._places = {replica.name: _Place(replica) for replica in self._replicas()}
        for place in self._places.values():
            place.replica.warm_up()
        self._index = _PoolIndex(self._places) if self._one_pool else MemoryIndex()
        leases = [place.replica.lease() for place in self._places.values()]
        self._routers = [
            SimulatedRouter(f"router-{number}", leases, self._index, POLICIES[policy]())
            for number in range(shape.routers)
        ]
        self._start = max(place.replica.now for place in self._places.values())
        self._exchange = Exchange(self._routers, self._start)
        self._to_come: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._fates: list[Fate] = []
        self._left = len(trace.requests)

    def run(self, say: Say = lambda done: None) -> Outcome:
        """Until every request has ended; `say` is told how many have."""
        now = start = self._start
        for number, request in enumerate(self._trace.requests):
            self._fates.append(Fate(request.prompt, start + request.arrival_s))
            for at, exchange in self._exchange.wanted(number % len(self._routers), start + request.arrival_s):
                self._at(at, exchange)
        self._at(start, partial(self._arrive, 0))
        while self._left:
            left = self._left
            now, _, act = heapq.heappop(self._to_come)
            act(now)
            if self._left != left:
                say(len(self._fates) - self._left)
        replicas = [place.replica for place in self._places.values()]
        pools = {id(replica.pool): replica.pool for replica in replicas}
        evictions = sum(pool.evictions for pool in pools.values())
        return Outcome(self._fates, [replica.busy_s for replica in replicas], evictions, now - start)

    def _replicas(self) -> list[Replica]:
        shape = self._shape.replica(self._trace)
        workers = self._shape.workers
        names = [f"worker-{number:04}" for number in range(workers)]
        if not self._one_pool:
            return [Replica(name, shape) for name in names]
        first = Replica(names[0], replace(shape, num_blocks=shape.num_blocks * workers))
        return [first, *(Replica(name, first.shape, beside=first) for name in names[1:])]

    def _at(self, when: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._to_come, (when, next(self._order), act))

    # Requests

    def _arrive(self, number: int, now: float) -> None:
        request = self._trace.requests[number]
        if number + 1 < len(self._fates):
            self._at(self._fates[number + 1].arrival_s, partial(self._arrive, number + 1))
        token_ids = self._trace.tokens(request)
        keys = block_keys((Region(ROOT, None),), token_ids, self._trace.units)
        # As the dispatcher: what all share, which would be published, must not bring everything to one worker.
        tie_key = keys[self._trace.head] if self._trace.head < len(keys) else token_ids.tobytes()
        router = self._routers[number % len(self._routers)]
        router.now = now
        prompt = Prompt(request.prompt, request.answer, tie_key)
        worker = router.place(number, prompt, keys, request.session.encode() or tie_key)
        if worker is None:
            self._left -= 1
            return
        send = partial(self._take, self._places[worker], request, token_ids)
        self._at(now + self._shape.link_s, send)

    def _take(self, place: _Place, request: TraceRequest, token_ids: array[int], now: float) -> None:
        place.replica.submit(request.number, token_ids, request.answer)
        if place.due is None or place.due > place.replica.now:
            self._wake(place, max(now, place.replica.now))

    # Workers

    def _wake(self, place: _Place, when: float) -> None:
        place.due = when
        self._at(when, partial(self._step, place))

    def _step(self, place: _Place, now: float) -> None:
        if place.due != now:
            return
        place.due = None
        ran, reports = place.replica.step(now)
        for report in reports:
            self._report(place, report)
        ended = place.replica.now
        if ran:
            self._wake(place, ended)
        elif place.replica.has_work:
            self._wake(place, ended + POLL_S)
        elif place.load_at < ended:
            self._wake(place, max(ended, place.load_at) + LOAD_INTERVAL_S)

    def _report(self, place: _Place, report: StepReport) -> None:
        ended, name = place.replica.now, place.replica.name
        if report.load is not None:
            place.load_at = ended
        if report.outputs or report.load is not None:
            self._at(ended + self._shape.link_s, partial(self._hear, name, report.outputs, report.load))
        if report.events:
            self._at(ended + self._shape.event_lag_s, partial(self._learn, name, report.events))

    # Routers

    def _hear(self, worker: str, outputs: Sequence[SequenceOutput], load: Load | None, now: float) -> None:
        for router in self._routers:
            router.now = now
            if load is not None:
                router.take_load(worker, load)
        for output in outputs:
            fate = self._fates[output.sequence_id]
            if output.admission is not None:
                fate.cached = output.admission.cached_device_tokens
            if output.token_ids and fate.ttft_s is None:
                fate.ttft_s = now - fate.arrival_s
            if output.finish is not None:
                self._left -= 1
            self._routers[output.sequence_id % len(self._routers)].take_output(output)

    def _learn(self, worker: str, events: Sequence[Event], now: float) -> None:
        self._index.apply(WorkerId(worker), 1, events)
