"""The workers that this router believes in: who is refused, linked, ready, gone, and a place at one of them.

Knows no text and decides nothing: `placement` does, on the members' candidates. Invariant: choosing a worker and
reserving it is one step without an await.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import PurePath

from kvstore.block import BlockKey, WorkerId
from kvstore.block_key import key_fingerprint
from kvstore.events import CPU, DEVICE, BlocksRemoved
from kvstore.lease import Lease
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from kvstore.scope import ScopeRoot
from router.board import Board
from router.link_messages import PinOrder, Purged, WorkerHello
from router.member import Clock, FirstOutput, Member, Reservation
from router.peers import Loads, PeerLoads
from router.placement import Candidate, Placement, Policy
from router.standing import Ask, WorkerState
from router.worker_link import WorkerLink

__all__ = ["Ask", "Fleet", "FleetModel", "Reservation", "WorkerState", "WorkerView"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker, for `Admin.ListWorkers` and `pando status`. `reason` says why it is not ready."""

    id: str
    epoch: int
    state: WorkerState
    address: str
    model: str
    pid: int
    running: int
    waiting: int
    device_blocks: int
    free_blocks: int
    cached_blocks: int
    queued_tokens: int
    prefill_tokens_per_s: float
    indexed_blocks: int
    reason: str


@dataclass(frozen=True, slots=True)
class FleetModel:
    """The model that all workers of the fleet serve."""

    model: str
    model_fingerprint: bytes
    block_size: int
    vocab_size: int
    max_model_len: int


class Fleet:
    """Follows the leases, keeps a link to each worker it accepts, and reserves. For one event loop.

    `model` is the name the router was told to serve; a worker that serves another one, keys blocks otherwise or has
    another block size is refused. The first worker accepted decides the model's fingerprint for as long as one like it
    is there.
    """

    def __init__(
        self,
        mirror: Mirror,
        index: MemoryIndex,
        *,
        router: str,
        model: str,
        block_size: int,
        policy: Policy = "cost",
        clock: Clock = time.monotonic,
        link_type: Callable[..., WorkerLink] = WorkerLink,
    ) -> None:
        self._mirror = mirror
        self._index = index
        self._router = router
        self._model = PurePath(model).name
        self._block_size = block_size
        self._policy: Policy = policy
        self._clock = clock
        self._link_type = link_type
        self._members: dict[WorkerId, Member] = {}
        self._fitting: dict[str, set[WorkerId]] = {}  # by the fingerprint of their model
        self._ready_workers: set[WorkerId] = set()
        self._board = Board(block_size, clock())
        self._adopted: FleetModel | None = None
        self._ready = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._turn = 0

    async def start(self) -> None:
        """Follow the mirror's leases from now on, those it already has first."""
        self._mirror.on_lease_change = self._lease_changed
        for worker, lease in self._mirror.leases().items():
            self._lease_changed(worker, lease)

    async def stop(self) -> None:
        """Close every link; their streams are lost. Idempotent."""
        self._mirror.on_lease_change = None
        for worker in list(self._members):
            self._drop(worker)
        await asyncio.gather(*self._closing)

    @property
    def ready(self) -> bool:
        """Whether at least one worker takes requests."""
        return self._ready.is_set()

    @property
    def model_spec(self) -> FleetModel | None:
        """None until a worker has been accepted."""
        return self._adopted

    @property
    def num_reserved(self) -> int:
        """Answers of this router that hold a place at a worker of the fleet."""
        return sum(member.num_open for member in self._members.values())

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait for a worker that takes requests; whether one came."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return False
        return True

    def workers(self) -> list[WorkerView]:
        """Every worker that has a lease, in order of its name."""
        return [self._view(self._members[worker]) for worker in sorted(self._members)]

    def reserve(self, ask: Ask) -> Reservation | Placement:
        """Choose a worker and hold a place there; the `Placement` alone, with its reasons, where none can take it."""
        now = self._clock()
        found = self._index.match(ask.keys)
        placement = self._board.decide(ask, found, now, (self._policy, self._turn))
        if placement.worker is None:
            return placement
        self._turn += 1
        held = found.get(placement.worker)
        reservation = self._members[placement.worker].open(
            placement,
            ask,
            held.device_blocks if held else 0,
            self._clock,
            source=self._members[placement.pull.source] if placement.pull is not None else None,
        )
        self._board.placed(placement, ask.keys if ask.stores else (), now)
        return reservation

    @property
    def peers(self) -> PeerLoads:
        """What the other routers sent, for whoever hears of it."""
        return self._board.peers

    def sent(self) -> Loads:
        """What this router sent and has no answer to yet, for the others."""
        return self._board.sent(self._clock())

    def explain(self, ask: Ask) -> Placement:
        """What `reserve` would decide, without reserving."""
        return self._board.decide(ask, self._index.match(ask.keys), self._clock(), (self._policy, self._turn))

    def candidates(self, ask: Ask) -> list[Candidate]:
        """Every worker as placement sees it, in order of its name."""
        return self._board.candidates(ask, self._index.match(ask.keys), self._clock())

    def holders(self, keys: Sequence[BlockKey]) -> dict[WorkerId, int]:
        """For each ready worker, how many leading blocks of a chain it holds, on any tier."""
        found = self._index.match(keys) if keys else {}
        ready = (worker for worker, member in self._members.items() if member.state is WorkerState.READY)
        return {worker: found[worker].num_blocks if worker in found else 0 for worker in ready}

    def epoch_of(self, worker: WorkerId) -> int:
        """The life of a worker that this router knows; 0 for one it does not know."""
        member = self._members.get(worker)
        return 0 if member is None else member.lease.epoch

    def pin(self, worker: WorkerId, order: PinOrder) -> bool:
        """Ask a worker to keep a prefix's blocks; False where there is no session to say it on."""
        member = self._members.get(worker)
        return member is not None and member.link.pin(order)

    def unpin(self, prefix: bytes) -> None:
        """Tell every worker that a prefix is pinned no more."""
        for member in self._members.values():
            member.link.unpin(prefix)

    async def purge(self, roots: Sequence[ScopeRoot], timeout_s: float) -> dict[WorkerId, Purged | None]:
        """Have every worker forget the blocks of some scopes; None for one that did not answer.

        Where they give blocks to each other, each is asked again when all have answered: one that was asked early may
        have got blocks from one that was asked late.
        """
        links = {worker: member.link for worker, member in self._members.items() if not member.refused}
        answers = await asyncio.gather(*(link.purge(roots, timeout_s) for link in links.values()))
        if self._board.can_pull:
            later = await asyncio.gather(*(link.purge(roots, timeout_s) for link in links.values()))
            answers = [one and two and one.then(two) for one, two in zip(answers, later, strict=True)]
        return dict(zip(links, answers, strict=True))

    def note_draining(self, worker: WorkerId, epoch: int) -> None:
        """This life of the worker takes no more requests: it said so to one, before its lease or load did."""
        member = self._members.get(worker)
        if member is not None and member.lease.epoch == epoch:
            member.said_draining = True
            self._board.touch(member)
            self._update_ready(member)

    # Leases and links

    def _lease_changed(self, worker: WorkerId, lease: Lease | None) -> None:
        member = self._members.get(worker)
        if lease is None:
            self._lease_ended(worker, member)
        elif member is not None and member.life == (lease.epoch, lease.pid, lease.address):
            member.lease = lease
            member.ended = False
            self._board.touch(member)
            self._update_ready(member)
        else:
            self._drop(worker)
            self._members[worker] = Member(
                lease,
                self._new_link(lease),
                self._board.heads,
                self._board.peers,
                on_change=self._board.touch,
                on_first=self._first_output,
            )
            self._board.set_members(self._members)
            self._join(self._members[worker])

    def _lease_ended(self, worker: WorkerId, member: Member | None) -> None:
        """No new request goes there; those that run go on while the link lives."""
        if member is not None:
            logger.info("the lease of worker %s ended, epoch %d", worker, member.lease.epoch)
            member.ended = True
            self._link_changed(worker)

    def _new_link(self, lease: Lease) -> WorkerLink:
        fingerprint = _fingerprint(lease.model_fingerprint, self._block_size)
        hello = WorkerHello(lease.worker_id, lease.epoch, self._block_size, fingerprint)
        on_change = partial(self._link_changed, WorkerId(lease.worker_id))
        return self._link_type(lease.address, router=self._router, expected=hello, on_change=on_change)

    def _drop(self, worker: WorkerId) -> None:
        member = self._members.pop(worker, None)
        if member is not None:
            self._board.set_members(self._members)
            self._leave(member)
            task = asyncio.create_task(member.link.stop())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _link_changed(self, worker: WorkerId) -> None:
        member = self._members.get(worker)
        if member is None:
            return
        self._board.touch(member)
        self._update_ready(member)
        if member.ended and not (member.link.live and member.link.num_streams):
            self._drop(worker)
            if self._adopt():
                self._judge(self._members.values())

    def _first_output(self, member: Member, first: FirstOutput) -> None:
        """Learn from it. Blocks that were not there, and are not stored now, are struck from the index."""
        self._board.learn(member, first, self._clock())
        pull, admission = first.placement.pull, first.admission
        if pull is not None:
            if admission.peer_lacks and first.source is not None:
                had = (admission.cached_device + admission.cached_cpu) // self._block_size
                self._strike(first.source, first.keys[had : pull.num_tokens // self._block_size])
            return
        found = first.admission.cached_tokens // self._block_size
        missing = first.keys[found : first.placement.predicted_cached // self._block_size]
        if missing and not first.stores:
            self._index.apply(member.id, member.lease.epoch, [BlocksRemoved(list(missing))])

    def _strike(self, member: Member, keys: Sequence[BlockKey]) -> None:
        """It said that it has none of these, on any tier."""
        if keys and self._members.get(member.id) is member:
            struck = [BlocksRemoved(list(keys), tier) for tier in (DEVICE, CPU)]
            self._index.apply(member.id, member.lease.epoch, struck)

    def _update_ready(self, member: Member) -> None:
        """Its state may have changed."""
        if self._members.get(member.id) is member and member.state is WorkerState.READY:
            self._ready_workers.add(member.id)
        else:
            self._ready_workers.discard(member.id)
        (self._ready.set if self._ready_workers else self._ready.clear)()

    # Who belongs

    def _join(self, member: Member) -> None:
        """A member is new. The others are looked at only where it changes what is served: a thousand may come."""
        if not self._mismatch(member.lease):
            self._fitting.setdefault(member.lease.model_fingerprint, set()).add(member.id)
        self._judge(self._members.values() if self._adopt() else [member])

    def _leave(self, member: Member) -> None:
        self._update_ready(member)
        for fingerprint, workers in list(self._fitting.items()):
            workers.discard(member.id)
            if not workers:
                del self._fitting[fingerprint]

    def _judge(self, members: Iterable[Member]) -> None:
        """Refuse or accept each, and link to those accepted."""
        for member in members:
            refused = self._refusal(member.lease)
            if refused and not member.refused:
                logger.warning("worker %s is refused: %s", member.lease.worker_id, refused)
            member.refused = refused
            self._board.touch(member)
            if not refused:
                member.link.start()
            self._update_ready(member)

    def _adopt(self) -> bool:
        """Keep to the model that is served; choose anew only when no worker serves it any more. Whether that was so."""
        current = self._adopted.model_fingerprint.hex() if self._adopted else ""
        if not self._fitting or current in self._fitting:
            return False
        first = min(min(workers) for workers in self._fitting.values())
        self._adopted = _fleet_model(self._members[first].lease)
        return True

    def _refusal(self, lease: Lease) -> str:
        mismatch = self._mismatch(lease)
        if mismatch or self._adopted is None:
            return mismatch
        same = lease.model_fingerprint == self._adopted.model_fingerprint.hex()
        return "" if same else "its model is not the one that the fleet serves"

    def _mismatch(self, lease: Lease) -> str:
        """What of a worker does not fit this router, whatever others serve."""
        if lease.block_size != self._block_size:
            return f"its block size is {lease.block_size}, the router's {self._block_size}"
        if PurePath(lease.model).name != self._model:
            return f"it serves {lease.model}, the router {self._model}"
        if lease.key_fingerprint != _fingerprint(lease.model_fingerprint, self._block_size):
            return "its key fingerprint differs: it would name blocks otherwise"
        return ""

    def _view(self, member: Member) -> WorkerView:
        lease, load = member.lease, member.load
        return WorkerView(
            id=lease.worker_id,
            epoch=lease.epoch,
            state=member.state,
            address=lease.address,
            model=lease.model,
            pid=lease.pid,
            running=load.running,
            waiting=load.waiting,
            device_blocks=lease.device_blocks,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            queued_tokens=member.queued_tokens,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            indexed_blocks=self._index.num_blocks(WorkerId(lease.worker_id)),
            reason=member.reason,
        )


@lru_cache(maxsize=16)
def _fingerprint(model_fingerprint: str, block_size: int) -> str:
    """What a lease's key fingerprint must be; empty for a model fingerprint that is none."""
    try:
        return key_fingerprint(bytes.fromhex(model_fingerprint), block_size)
    except ValueError:
        return ""


def _fleet_model(lease: Lease) -> FleetModel:
    return FleetModel(
        model=lease.model,
        model_fingerprint=bytes.fromhex(lease.model_fingerprint),
        block_size=lease.block_size,
        vocab_size=lease.vocab_size,
        max_model_len=lease.max_model_len,
    )
