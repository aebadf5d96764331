"""A router of the simulated fleet: the real `Fleet`, index and placement, with links that the replay feeds.

Knows no clock of its own and no worker: what it is told of either, it is told late, as over a wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, cast

from bench.simulate.baselines import Choose, Question
from bench.simulate.replica import MODEL
from kvstore.block import BlockKey, WorkerId
from kvstore.lease import Lease
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from router.fleet import Fleet
from router.link_messages import AdmissionReport, WorkerLoad
from router.member import Reservation
from router.peers import Loads, PeerLoads
from router.placement import Placement, Prompt
from router.standing import Ask
from router.worker_link import WorkerLink
from worker.engine import Load
from worker.sequence import AdmissionFacts, SequenceOutput

_LOAD_FIELDS = tuple(field.name for field in fields(WorkerLoad))


class SaidLink:
    """What the fleet sees of a `WorkerLink`: always up, with the load that was last said."""

    def __init__(self, address: str, *, on_change: Callable[[], None], **_: Any) -> None:
        self.address = address
        self.on_change = on_change
        self.load: WorkerLoad | None = None
        self.num_loads = 0
        self.num_streams = 0
        self.live = True
        self.reason = ""

    def start(self) -> None:
        """It is up already."""

    async def stop(self) -> None:
        """Nothing to close."""


class _Leases:
    """What the fleet sees of a `Mirror`: leases that never change."""

    def __init__(self, leases: Sequence[Lease]) -> None:
        self.on_lease_change: Callable[[WorkerId, Lease | None], None] | None = None
        self._leases = {WorkerId(lease.worker_id): lease for lease in leases}

    def leases(self) -> dict[WorkerId, Lease]:
        return dict(self._leases)


class SimulatedRouter:
    """Places requests by `choose`, or by the fleet's own placement where that names nobody."""

    def __init__(self, name: str, leases: Sequence[Lease], index: MemoryIndex, choose: Choose) -> None:
        self.name = name
        self.now = 0.0
        self._choose = choose
        self._links: dict[str, SaidLink] = {}
        self._reservations: dict[int, Reservation] = {}
        self._outstanding = {WorkerId(lease.worker_id): 0 for lease in leases}
        self._fleet = Fleet(
            cast(Mirror, _Leases(leases)),
            index,
            router=name,
            model=MODEL,
            block_size=leases[0].block_size,
            clock=lambda: self.now,
            link_type=cast(Callable[..., WorkerLink], self._new_link),
        )
        asyncio.run(self._fleet.start())

    def place(self, number: int, prompt: Prompt, keys: Sequence[BlockKey], sticky: bytes) -> WorkerId | None:
        """Reserve a place; None where no worker can take the request."""
        ask = Ask(prompt, keys)
        holders = partial(self._fleet.holders, keys)
        chosen = self._choose(Question(len(keys), sticky, self._outstanding, holders, self._queued))
        held = self._fleet.reserve(ask if chosen is None else replace(ask, only=chosen))
        if isinstance(held, Placement):
            return None
        self._reservations[number] = held
        self._outstanding[held.worker] += 1
        return held.worker

    @property
    def peers(self) -> PeerLoads:
        """What the other routers said."""
        return self._fleet.peers

    def sent(self) -> Loads:
        """What this router says to the others."""
        return self._fleet.sent()

    def take_output(self, output: SequenceOutput) -> None:
        """A worker said something of a request."""
        held = self._reservations[output.sequence_id]
        if output.token_ids:
            held.started(_report(output.admission) if output.admission is not None else None)
        if output.finish is not None:
            del self._reservations[output.sequence_id]
            self._outstanding[held.worker] -= 1
            held.release()

    def take_load(self, worker: str, load: Load) -> None:
        """A worker said how busy it is."""
        link = self._links[worker]
        link.load = WorkerLoad(*(getattr(load, field) for field in _LOAD_FIELDS))
        link.num_loads += 1
        link.on_change()

    def _queued(self) -> dict[WorkerId, int]:
        return {WorkerId(view.id): view.queued_tokens for view in self._fleet.workers()}

    def _new_link(self, address: str, **told: Any) -> SaidLink:
        self._links[address] = SaidLink(address, **told)
        return self._links[address]


def _report(facts: AdmissionFacts) -> AdmissionReport:
    return AdmissionReport(cached_device=facts.cached_device_tokens, cached_cpu=facts.cached_cpu_tokens)
