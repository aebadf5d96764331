"""One life of a worker as this router sees it: lease, link, load, and the router's own requests in flight there.

Decides nothing and knows no other worker. Invariant: a reservation counts from the moment it is opened until it is
released, once, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.block import BlockKey, WorkerId
from kvstore.lease import Lease
from router.computing import Chain, Computing, Heads
from router.crowd import Crowd
from router.lines import NOBODY_WAITS, Line, joined
from router.link_messages import AdmissionReport, PullOrder, WorkerLoad
from router.peers import FRESH_S, PeerLoads, marks
from router.placement import Placement
from router.pulls import Giver, timeout_s
from router.rates import Mean
from router.report import ReportedLoad
from router.standing import (
    CONTEXT_LENGTH,
    IS_DRAINING,
    KV_CAPACITY,
    NOT_ASKED,
    NOT_READY,
    QUEUE_FULL,
    TRIED,
    Ask,
    Queue,
    Standing,
    WorkerState,
)
from router.worker_link import WorkerLink

Clock = Callable[[], float]

SERVICE_WEIGHT = 0.1
LOAD_SHARE = 0.1
"""Until it is measured: a token loaded from the CPU tier takes this share of the time of one that is computed."""


@dataclass(frozen=True, slots=True)
class FirstOutput:
    """What is known when a request's first output comes: `seconds` after it was placed. `source`: of its pull."""

    placement: Placement
    keys: Sequence[BlockKey]
    stores: bool
    admission: AdmissionReport
    seconds: float
    source: Member | None = None


class Reservation:
    """A request's place at a worker, from the decision until `release`."""

    __slots__ = (
        "_chain",
        "_clock",
        "_member",
        "_released",
        "_source",
        "_waiting",
        "ask",
        "load_number",
        "marks",
        "num_answers",
        "placed_at",
        "placement",
        "pull",
    )

    def __init__(
        self,
        member: Member,
        placement: Placement,
        ask: Ask,
        chain: Chain | None,
        clock: Clock,
        *,
        source: Member | None = None,
    ) -> None:
        self.placement = placement
        self.pull = None if source is None else source.pull_order(placement)
        self.ask = ask
        self.num_answers = ask.num_answers
        self.load_number = member.link.num_loads
        self._chain = chain
        self._member = member
        self._source = source
        self._clock = clock
        self.placed_at = clock()
        self.marks = b"" if chain is None else marks(chain.keys, chain.start)
        self._released = False
        self._waiting = True

    @property
    def worker(self) -> WorkerId:
        return self._member.id

    @property
    def epoch(self) -> int:
        return self._member.lease.epoch

    @property
    def link(self) -> WorkerLink:
        return self._member.link

    def started(self, admission: AdmissionReport | None = None) -> None:
        """The first output is in: its prompt queues no more. `admission` is what the worker found. Idempotent."""
        if not self._waiting:
            return
        self._waiting = False
        now = self._clock()
        self._member.leave_queue(self, now)
        source = self._source
        if source is not None:
            source.end_pull()
        if admission is not None:
            told = (self.placement, self.ask.keys, self.ask.stores, admission, now - self.placed_at, source)
            self._member.learn(FirstOutput(*told))

    def refused(self) -> None:
        """The worker's queue had no place for it."""
        self._member.crowd.note_refused(self.ask.owner, self._member.link.num_loads)

    def end_answer(self) -> None:
        """One of its sequences has ended, and others go on."""
        self.num_answers -= 1
        self._member.leave_slots(self, 1, has_run=not self._waiting)

    def release(self) -> None:
        """Give the place back. Idempotent."""
        if self._released:
            return
        self._released = True
        has_run = not self._waiting
        self.started()
        now = self._clock()
        self._member.close(self, self._chain, has_run, now, now - self.placed_at)


class Member:
    """One life of a worker, as this router sees it. `peers`: what the other routers have there.

    `on_change` is called whenever its standing may have changed, `on_first` with what a first output tells.
    """

    def __init__(
        self,
        lease: Lease,
        link: WorkerLink,
        heads: Heads,
        peers: PeerLoads,
        *,
        on_change: Callable[[Member], None] = lambda member: None,
        on_first: Callable[[Member, FirstOutput], None] = lambda member, first: None,
    ) -> None:
        self.id = WorkerId(lease.worker_id)
        self.lease = lease
        self.link = link
        self.computing = Computing(self.id, heads)
        self.crowd = Crowd()
        self._peers = peers
        self.refused = ""
        self.ended = False
        self.said_draining = False
        self.num_open = 0
        self.confidence = Mean(1.0)
        self.load_share = Mean(LOAD_SHARE)
        self.giver = Giver()
        self._on_change = on_change
        self._on_first = on_first
        self._num_started = 0
        self._queued_tokens = 0
        self._waiting: dict[Reservation, None] = {}  # in the order that they were placed
        self._started_at = float("-inf")  # the newest first output
        self._service_s = 0.0
        self._reported = ReportedLoad()

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

    @property
    def payload_format(self) -> str:
        """Of the blocks that it can give at present; empty if it can give none."""
        return self.lease.payload_format if self.link.live else ""

    @property
    def queued_tokens(self) -> int:
        """Uncached prompt tokens ahead of a new request, those of the prompt that is being computed included."""
        queue = self._queue(self.load)
        return max(queue.reported, queue.sent + queue.others)

    def in_flight(self, load: WorkerLoad) -> int:
        others = self._peers.at(self.id, self.lease.epoch).in_flight
        return max(self.num_open + others, self._reported.in_flight(self.link.num_loads, load))

    def sent_tokens(self, now: float, s_per_token: float) -> int:
        """Those of this router that are not computed yet."""
        queue = self._queue(self.load)
        return queue.sent - min(queue.first, int(max(0.0, now - queue.first_since) / s_per_token))

    def fresh_tokens(self, now: float) -> int:
        """Of those that this router waits for what it sent just now."""
        tokens = 0
        for waiting in reversed(self._waiting):
            if now - waiting.placed_at > FRESH_S:
                break
            tokens += waiting.placement.uncached_tokens
        return tokens

    def marks(self) -> bytes:
        """Those of the prompts that this router waits for."""
        return b"".join([waiting.marks for waiting in self._waiting])

    def standing(self) -> Standing:
        """As it is now."""
        load = self.load
        in_flight = self.in_flight(load)
        number = self.link.num_loads
        others = self._peers.at(self.id, self.lease.epoch)
        waiting = self.num_waiting + others.waiting
        started = self._num_started + others.in_flight - others.waiting
        running = max(started, self._reported.running(number, load) - waiting)
        return Standing(
            queue=self._queue(load),
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            # Where prompts alone are computed the running step is a part of the queue, and not to be counted twice.
            step_s=load.step_ms / 1e3 if running > 0 else 0.0,
            slot_wait_s=self._slot_wait_s(in_flight),
            running=running,
            own_in_flight=self.num_open,
            in_flight=in_flight,
            free_tokens=max(0, load.free_blocks * self.lease.block_size - self._reported.promised_tokens(number)),
            load_share=self.load_share.value,
            confidence=self.confidence.value,
            excluded=self._exclusion(in_flight),
            line=self._line(load, in_flight, others.line),
        )

    def refusal(self, ask: Ask, standing: str) -> str:
        """Why it cannot take this request, empty if it can; `standing` is why it can take none."""
        prompt, lease = ask.prompt, self.lease
        if standing == QUEUE_FULL and self.crowd.may_ask(ask.owner, ask.weight, self.num_places, self.link.num_loads):
            standing = ""
        if ask.only not in (None, self.id):
            return NOT_ASKED
        if standing and standing != QUEUE_FULL:
            return standing
        if prompt.num_tokens + prompt.max_tokens > lease.max_model_len:
            return CONTEXT_LENGTH
        if min(prompt.num_positions, lease.max_held or prompt.num_positions) > self.num_slots:
            return KV_CAPACITY
        return standing or (TRIED if (self.id, lease.epoch) in ask.avoid else "")

    @property
    def num_places(self) -> int:
        """Sequences that it takes, running and waiting; 0 where it did not say."""
        return self.lease.max_sequences + self.lease.max_waiting if self.lease.max_waiting else 0

    @property
    def num_waiting(self) -> int:
        """Own sequences that have no first token."""
        return self.num_open - self._num_started

    @property
    def num_slots(self) -> int:
        """Token positions that its device has room for."""
        return self.lease.device_blocks * self.lease.block_size

    def open(
        self, placement: Placement, ask: Ask, held_blocks: int, clock: Clock, *, source: Member | None = None
    ) -> Reservation:
        """Count a request from now on, of whose keys the index has the first `held_blocks`. `source`: of its pull."""
        self._reported.placed(self.link.num_loads, placement.uncached_tokens, ask.num_answers)
        self._queued_tokens += placement.uncached_tokens
        self.num_open += ask.num_answers
        self.crowd.enter(ask.owner, ask.weight, ask.num_answers, ask.num_tokens(placement.uncached_tokens))
        if placement.pull is not None:
            # What comes is not computed: who waits for it here finds nothing being computed.
            held_blocks = max(held_blocks, placement.pull.num_tokens // self.lease.block_size)
        chain = self.computing.begin(ask.keys, held_blocks) if ask.stores and self.lease.reuse else None
        self._on_change(self)
        reservation = Reservation(self, placement, ask, chain, clock, source=source)
        self._waiting[reservation] = None
        return reservation

    def pull_order(self, placement: Placement) -> PullOrder | None:
        """How a request placed elsewhere shall ask for this worker's blocks; its pull counts until `end_pull`."""
        pull, lease = placement.pull, self.lease
        if pull is None:
            return None
        self.giver.under_way += 1
        self._on_change(self)
        return PullOrder(lease.address, lease.epoch, pull.num_tokens // lease.block_size, timeout_s(pull))

    def end_pull(self) -> None:
        """One of the pulls from here is over."""
        self.giver.under_way -= 1
        self._on_change(self)

    def leave_queue(self, reservation: Reservation, now: float) -> None:
        """Count its prompt tokens no more."""
        del self._waiting[reservation]
        self._started_at = now
        uncached, ask = reservation.placement.uncached_tokens, reservation.ask
        self._queued_tokens -= uncached
        self.crowd.begin(ask.owner, ask.num_tokens(uncached))
        self._num_started += reservation.num_answers
        self._reported.started(self.link.num_loads, reservation.load_number, uncached)
        self._on_change(self)

    def learn(self, first: FirstOutput) -> None:
        """What the first output tells of the prediction."""
        self._on_first(self, first)
        self._on_change(self)

    def leave_slots(self, reservation: Reservation, num_answers: int, *, has_run: bool) -> None:
        """Count so many of its sequences no more."""
        self.num_open -= num_answers
        self.crowd.leave(reservation.ask.owner, num_answers)
        if has_run:
            self._num_started -= num_answers
        self._reported.ended(self.link.num_loads, reservation.load_number, num_answers)
        self._on_change(self)

    def close(self, reservation: Reservation, chain: Chain | None, has_run: bool, now: float, seconds: float) -> None:
        """Count a request no more. What it computed stays credited until events must have come."""
        self.leave_slots(reservation, reservation.num_answers, has_run=True)
        if chain is not None:
            self.computing.end(chain, has_run, now)
        if has_run:
            self._service_s += (seconds - self._service_s) * (SERVICE_WEIGHT if self._service_s else 1.0)

    def _queue(self, load: WorkerLoad) -> Queue:
        first, since = 0, 0.0
        if self._waiting:
            oldest = next(iter(self._waiting))
            first, since = oldest.placement.uncached_tokens, max(oldest.placed_at, self._started_at)
        others = self._peers.at(self.id, self.lease.epoch).queued_tokens
        return Queue(self._reported.queued_tokens(self.link.num_loads, load), self._queued_tokens, first, since, others)

    def _line(self, load: WorkerLoad, in_flight: int, others: Line) -> Line:
        """Who waits there for a place; nobody while it takes all that come, one after the other."""
        if not load.waiting and in_flight <= self.lease.max_sequences:
            return NOBODY_WAITS
        return joined(self.crowd.line, others) if others else self.crowd.line

    def _slot_wait_s(self, in_flight: int) -> float:
        slots = self.lease.max_sequences
        if not slots or in_flight < slots:
            return 0.0
        return (in_flight + 1 - slots) * self._service_s / slots

    def _exclusion(self, in_flight: int) -> str:
        """Why it can take no request at all; where its queue is full, none of those that have their part of it."""
        state = self.state
        if state is not WorkerState.READY:
            return IS_DRAINING if state is WorkerState.DRAINING else NOT_READY
        return QUEUE_FULL if self.num_places and in_flight >= self.num_places else ""
