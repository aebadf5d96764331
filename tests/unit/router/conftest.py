"""A fleet without a network: leases said by the test, links that the test brings up, feeds and breaks."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
import pytest_asyncio

from kvstore.block import BlockKey, WorkerId
from kvstore.block_key import key_fingerprint
from kvstore.events import BlocksStored
from kvstore.lease import Lease
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from pando.worker.v1 import worker_pb2 as pb
from router.fleet import Fleet
from router.link_messages import WorkerLoad
from router.member import Reservation
from router.placement import Prompt
from router.standing import Ask
from router.worker_link import WorkerLink

BLOCK = 16
MODEL_FINGERPRINT = b"m" * 16


class SaidLink(WorkerLink):
    """A link whose other end is the test."""

    def start(self) -> None:
        self.was_started = True

    async def stop(self) -> None:
        self.break_off()

    def come_up(self) -> None:
        self.live = True
        self.reason = ""
        self._on_change()

    def break_off(self) -> None:
        self._lose_all()

    def say_load(self, **load: Any) -> None:
        self.load = WorkerLoad(**load)
        self.num_loads += 1
        self._on_change()

    def say(self, sequence: int, **output: Any) -> None:
        output.setdefault("attempt", 1)
        self._deliver(pb.SequenceOutput(sequence=sequence, **output))

    def sent(self) -> list[pb.RouterMessage]:
        """What was sent since the last call."""
        messages = []
        while not self._outgoing.empty():
            messages.append(self._outgoing.get_nowait())
        return messages

    def submits(self) -> list[pb.Submit]:
        return [message.submit for message in self.sent() if message.HasField("submit")]


class SaidMirror:
    """Leases as the test says them."""

    def __init__(self) -> None:
        self.on_lease_change: Callable[[WorkerId, Lease | None], None] | None = None
        self.known: dict[WorkerId, Lease] = {}

    def leases(self) -> dict[WorkerId, Lease]:
        return dict(self.known)

    def say(self, lease: Lease) -> None:
        self.known[WorkerId(lease.worker_id)] = lease
        if self.on_lease_change is not None:
            self.on_lease_change(WorkerId(lease.worker_id), lease)

    def end(self, worker: str) -> None:
        del self.known[WorkerId(worker)]
        if self.on_lease_change is not None:
            self.on_lease_change(WorkerId(worker), None)


@dataclass
class Stage:
    """A fleet and everything it is made to believe."""

    now: float = 100.0
    index: MemoryIndex = field(default_factory=MemoryIndex)
    mirror: SaidMirror = field(default_factory=SaidMirror)
    fleet: Fleet = field(init=False)

    def __post_init__(self) -> None:
        self.fleet = Fleet(
            cast(Mirror, self.mirror),
            self.index,
            router="router-1",
            model="pando-tiny",
            block_size=BLOCK,
            clock=lambda: self.now,
            link_type=SaidLink,
        )

    def lease(self, worker: str, **changes: Any) -> Lease:
        lease = Lease(
            worker_id=worker,
            epoch=1,
            address=f"{worker}:1",
            model="pando-tiny",
            block_size=BLOCK,
            key_fingerprint=key_fingerprint(MODEL_FINGERPRINT, BLOCK),
            model_fingerprint=MODEL_FINGERPRINT.hex(),
            pid=7,
            device_blocks=1000,
            max_model_len=8192,
            vocab_size=1000,
            prefill_tokens_per_s=20_000.0,
            max_sequences=64,
            max_waiting=100,
        )
        return msgspec.structs.replace(lease, **changes)

    def add(self, *workers: str, **changes: Any) -> None:
        """Workers with a lease and a live link."""
        for worker in workers:
            self.mirror.say(self.lease(worker, **changes))
            self.link(worker).come_up()

    def link(self, worker: str) -> SaidLink:
        return cast(SaidLink, self.fleet._members[WorkerId(worker)].link)

    def store(self, worker: str, keys: Sequence[BlockKey], epoch: int = 1) -> None:
        self.index.apply(WorkerId(worker), epoch, [BlocksStored(list(keys))])

    def ask(self, keys: Sequence[BlockKey] = (), num_tokens: int = 100, **fields: Any) -> Ask:
        tie_key = keys[0] if keys else b"tie"
        return Ask(Prompt(num_tokens, fields.pop("max_tokens", 16), tie_key), keys, **fields)

    def reserve(self, keys: Sequence[BlockKey] = (), num_tokens: int = 100, **fields: Any) -> Reservation:
        reservation = self.fleet.reserve(self.ask(keys, num_tokens, **fields))
        assert isinstance(reservation, Reservation)
        return reservation


@pytest_asyncio.fixture
async def stage() -> AsyncIterator[Stage]:
    """An empty fleet that follows `stage.mirror`."""
    made = Stage()
    await made.fleet.start()
    yield made
    await made.fleet.stop()


@pytest.fixture
def some_keys() -> Callable[[str, int], list[BlockKey]]:
    """Makes block keys: `some_keys("a", 3)` are a's first three."""
    return lambda name, count: [BlockKey(f"{name}{i}".encode().ljust(16)) for i in range(count)]


@pytest.fixture
def tokens() -> Callable[[int], array[int]]:
    """Makes a prompt of so many tokens."""
    return lambda count: array("I", (i % 997 for i in range(count)))
