"""One router's session: its sequences, and what it has yet to be told.

Knows no wire format and no engine. Bounded: outputs merge by sequence, loads replace each other, of events and pongs
the oldest go; so a slow router gets fewer, larger messages.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from kvstore.ledger import Listener, SnapshotPart, Told
from worker.engine import Load
from worker.sequence import SequenceOutput

MAX_PENDING_EVENTS = 1024
MAX_PENDING_PONGS = 16


@dataclass(frozen=True, slots=True)
class Attempt:
    """The router's own name of a sequence."""

    sequence: int
    attempt: int


@dataclass(frozen=True, slots=True)
class News:
    """All that a session has to say at one moment."""

    outputs: dict[Attempt, SequenceOutput]
    feed: list[bytes | SnapshotPart]
    pongs: list[int]
    load: Load | None


class RouterSession:
    """`engine_ids` maps the router's sequence numbers to the engine's while they live. For one event loop."""

    def __init__(self, router: str) -> None:
        self.router = router
        self.engine_ids: dict[int, int] = {}
        self.listener: Listener | None = None  # of block events, once they were asked for
        self._outputs: dict[Attempt, SequenceOutput] = {}
        self._feed: list[bytes | SnapshotPart] = []
        self._pongs: list[int] = []
        self._load: Load | None = None
        self._wake = asyncio.Event()

    def add_output(self, attempt: Attempt, output: SequenceOutput) -> None:
        """Say `output`, together with what is pending of the same attempt."""
        pending = self._outputs.get(attempt)
        self._outputs[attempt] = output if pending is None else merged(pending, output)
        self._wake.set()

    def add_feed(self, told: Told) -> None:
        """Say encoded batches of block events, or a part of a snapshot."""
        self._feed += [told] if isinstance(told, SnapshotPart) else told
        del self._feed[:-MAX_PENDING_EVENTS]
        self._wake.set()

    def add_pong(self, nonce: int) -> None:
        """Answer a ping."""
        self._pongs.append(nonce)
        del self._pongs[:-MAX_PENDING_PONGS]
        self._wake.set()

    def set_load(self, load: Load) -> None:
        """Say the newest load."""
        self._load = load
        self._wake.set()

    async def news(self) -> News:
        """Wait until there is something to say, then take all of it."""
        await self._wake.wait()
        self._wake.clear()
        news = News(self._outputs, self._feed, self._pongs, self._load)
        self._outputs, self._feed, self._pongs, self._load = {}, [], [], None
        return news


def merged(first: SequenceOutput, then: SequenceOutput) -> SequenceOutput:
    """Two outputs of one sequence, one after the other, as one."""
    return replace(
        then,
        first_index=first.first_index,
        token_ids=first.token_ids + then.token_ids,
        admission=first.admission or then.admission,
    )
