"""One life of a worker as this router sees it: lease, link, load, and the router's own requests in flight there.

Decides nothing and knows no other worker. Invariant: a reservation counts from the moment it is opened until it is
released, once, however it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from kvstore.block import BlockKey, WorkerId
from kvstore.lease import Lease
from router.link_messages import WorkerLoad
from router.placement import Candidate, Placement, Prompt
from router.worker_link import WorkerLink

Clock = Callable[[], float]

# Why a candidate is excluded.
NOT_READY = "not ready"
IS_DRAINING = "draining"
CONTEXT_LENGTH = "context length"
KV_CAPACITY = "kv capacity"
QUEUE_FULL = "queue full"
TRIED = "already tried"
NOT_ASKED = "not asked"

EVENT_LAG_S = 2.0
"""Longest time to credit a finished prompt before the worker's events must have told of it."""

SERVICE_WEIGHT = 0.1


class WorkerState(Enum):
    """As `pando.v1.WorkerState` names them, in lower case."""

    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Ask:
    """What a reservation is asked for. `keys`: of every full block; `stores`: whether the worker will publish them."""

    prompt: Prompt
    keys: Sequence[BlockKey]
    stores: bool = True
    avoid: frozenset[tuple[WorkerId, int]] = frozenset()  # (worker, epoch) that this request has tried
    only: WorkerId | None = None
    num_answers: int = 1  # sequences that go on from the prompt, which is computed once


class Reservation:
    """A request's place at a worker, from the decision until `release`."""

    __slots__ = (
        "_clock",
        "_member",
        "_placed_at",
        "_released",
        "_waiting",
        "keys",
        "load_number",
        "num_answers",
        "placement",
    )

    def __init__(
        self, member: Member, placement: Placement, keys: Sequence[BlockKey], clock: Clock, num_answers: int = 1
    ) -> None:
        self.placement = placement
        self.keys = keys
        self.num_answers = num_answers
        self._member = member
        self._clock = clock
        self._placed_at = clock()
        self._released = False
        self._waiting = True
        self.load_number = member.link.num_loads

    @property
    def worker(self) -> WorkerId:
        return WorkerId(self._member.lease.worker_id)

    @property
    def epoch(self) -> int:
        return self._member.lease.epoch

    @property
    def link(self) -> WorkerLink:
        return self._member.link

    def started(self) -> None:
        """The first output is in: its prompt queues no more. Idempotent."""
        if self._waiting:
            self._waiting = False
            self._member.leave_queue(self)

    def end_answer(self) -> None:
        """One of its sequences has ended, and others go on."""
        self.num_answers -= 1
        self._member.leave_slots(self, 1)

    def release(self) -> None:
        """Give the place back. Idempotent."""
        if self._released:
            return
        self._released = True
        has_run = not self._waiting
        self.started()
        now = self._clock()
        self._member.close(self, has_run, now, now - self._placed_at)


class Member:
    """One life of a worker, as this router sees it."""

    def __init__(self, lease: Lease, link: WorkerLink) -> None:
        self.lease = lease
        self.link = link
        self.refused = ""
        self.ended = False
        self.said_draining = False
        self.num_open = 0
        self._queued_tokens = 0
        self._service_s = 0.0
        # Blocks that requests in flight, or a moment ago, compute or hold, each with how many of them do.
        self._computing: dict[BlockKey, int] = {}
        self._finished: deque[tuple[float, Sequence[BlockKey]]] = deque()
        # Own requests placed since the worker's load number `_counted_load`, which cannot count them yet.
        self._counted_load = 0
        self._new_tokens = 0
        self._new_requests = 0

    @property
    def life(self) -> tuple[int, int, str]:
        return self.lease.epoch, self.lease.pid, self.lease.address

    @property
    def load(self) -> WorkerLoad:
        """The newest report, from the link or, before the link has one, from the lease."""
        lease = self.lease
        return self.link.load or WorkerLoad(
            lease.running, lease.waiting, lease.queued_tokens, prefill_tokens_per_s=lease.prefill_tokens_per_s
        )

    @property
    def state(self) -> WorkerState:
        if self.refused:
            return WorkerState.REFUSED
        if not self.link.live:
            return WorkerState.CONNECTING
        draining = self.ended or self.said_draining or self.lease.draining or self.load.draining
        return WorkerState.DRAINING if draining else WorkerState.READY

    @property
    def reason(self) -> str:
        return self.refused or self.link.reason or ("its lease ended" if self.ended else "")

    def queued_tokens(self, load: WorkerLoad) -> int:
        """Uncached prompt tokens ahead of a new request.

        Either what the worker reported and we sent since, or all that we sent and saw no token of: the first knows
        other routers, the second what was on its way when the worker reported. Each counts ours once.
        """
        new = self._new_tokens if self._counted_load == self.link.num_loads else 0
        return max(self._queued_tokens, load.queued_tokens + new)

    def in_flight(self, load: WorkerLoad) -> int:
        new = self._new_requests if self._counted_load == self.link.num_loads else 0
        return max(self.num_open, load.running + load.waiting + new)

    def candidate(self, ask: Ask, device_blocks: int, now: float) -> Candidate:
        """This worker for one decision; `device_blocks` of the prompt are in the index."""
        self._expire(now)
        prompt, lease, load = ask.prompt, self.lease, self.load
        in_flight = self.in_flight(load)
        most = (prompt.num_tokens - 1) // lease.block_size
        depth = min(device_blocks, most)
        if depth < most and self._computing and lease.reuse:
            depth = self._computed_depth(ask.keys, depth, most)
        return Candidate(
            worker=WorkerId(lease.worker_id),
            cached_tokens=depth * lease.block_size,
            queued_tokens=self.queued_tokens(load),
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_s=load.step_ms / 1e3 if in_flight else 0.0,
            slot_wait_s=self._slot_wait_s(in_flight),
            excluded=self._exclusion(ask, in_flight),
        )

    def open(self, placement: Placement, keys: Sequence[BlockKey], clock: Clock, num_answers: int = 1) -> Reservation:
        """Count a request from now on; `keys` are those it will publish and the index does not have yet."""
        if self._counted_load != self.link.num_loads:
            self._counted_load, self._new_tokens, self._new_requests = self.link.num_loads, 0, 0
        self._new_tokens += placement.uncached_tokens
        self._new_requests += num_answers
        self._queued_tokens += placement.uncached_tokens
        self.num_open += num_answers
        counts = self._computing
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        return Reservation(self, placement, keys, clock, num_answers)

    def leave_queue(self, reservation: Reservation) -> None:
        """Count its prompt tokens no more."""
        self._queued_tokens -= reservation.placement.uncached_tokens
        if reservation.load_number == self._counted_load:
            self._new_tokens -= reservation.placement.uncached_tokens

    def leave_slots(self, reservation: Reservation, num_answers: int) -> None:
        """Count so many of its sequences no more."""
        self.num_open -= num_answers
        if reservation.load_number == self._counted_load:
            self._new_requests -= num_answers

    def close(self, reservation: Reservation, has_run: bool, now: float, seconds: float) -> None:
        """Count a request no more. What it computed stays credited until events must have come."""
        self.leave_slots(reservation, reservation.num_answers)
        if not has_run:
            self._forget(reservation.keys)
            return
        self._service_s += (seconds - self._service_s) * (SERVICE_WEIGHT if self._service_s else 1.0)
        self._finished.append((now + EVENT_LAG_S, reservation.keys))

    def _computed_depth(self, keys: Sequence[BlockKey], depth: int, most: int) -> int:
        while depth < most and keys[depth] in self._computing:
            depth += 1
        return depth

    def _slot_wait_s(self, in_flight: int) -> float:
        slots = self.lease.max_sequences
        if not slots or in_flight < slots:
            return 0.0
        return (in_flight + 1 - slots) * self._service_s / slots

    def _exclusion(self, ask: Ask, in_flight: int) -> str:
        prompt, lease = ask.prompt, self.lease
        if ask.only not in (None, lease.worker_id):
            return NOT_ASKED
        state = self.state
        if state is not WorkerState.READY:
            return IS_DRAINING if state is WorkerState.DRAINING else NOT_READY
        if prompt.num_tokens + prompt.max_tokens > lease.max_model_len:
            return CONTEXT_LENGTH
        held = min(prompt.num_positions, lease.max_held or prompt.num_positions)
        if held > lease.device_blocks * lease.block_size:
            return KV_CAPACITY
        if lease.max_waiting and in_flight >= lease.max_sequences + lease.max_waiting:
            return QUEUE_FULL
        return TRIED if (lease.worker_id, lease.epoch) in ask.avoid else ""

    def _expire(self, now: float) -> None:
        while self._finished and self._finished[0][0] <= now:
            self._forget(self._finished.popleft()[1])

    def _forget(self, keys: Sequence[BlockKey]) -> None:
        counts = self._computing
        for key in keys:
            left = counts[key] - 1
            if left:
                counts[key] = left
            else:
                del counts[key]
