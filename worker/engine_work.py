"""What reaches an engine's thread through its queue, beside requests and pins.

Knows no engine. Invariant: whoever waits for the answer of a call gets one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from worker.holdings import PinRequest
from worker.sequence import SequenceRequest


class EngineStopped(RuntimeError):
    """The engine's thread has ended and does nothing any more."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a sequence."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class Unpin:
    """Give up a pin."""

    name: str


class Call:
    """Work of somebody else's, done between two steps."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.answer: Future[Any] = Future()

    def run(self) -> None:
        """Do it; what it raises is raised here too."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self._work())
        except BaseException as error:  # whoever waits must not wait for ever; the engine ends all the same
            self.answer.set_exception(error)
            raise

    def refuse(self) -> None:
        """Answer that nobody will do it."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(EngineStopped())


class Drain:
    """Take no more requests."""


class Stop:
    """End the thread."""


Work = SequenceRequest | Cancel | PinRequest | Unpin | Call | Drain | Stop


class WorkQueue:
    """Work in the order it came. `put` is for any thread, the rest for the engine's."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Work] = SimpleQueue()
        self._held: Call | None = None

    def put(self, work: Work) -> None:
        """Leave work for the engine."""
        self._queue.put(work)

    def get(self, timeout_s: float | None = 0.0, *, calls: bool = True) -> Work | None:
        """The next of it, waited for so long (None: until there is some). Without `calls` none behind a call, which is
        kept for later with all that came after it."""
        work: Work | None = self._held
        if work is None:
            with suppress(Empty):
                work = self._queue.get_nowait() if timeout_s == 0.0 else self._queue.get(timeout=timeout_s)
        self._held = None
        if isinstance(work, Call) and not calls:
            self._held, work = work, None
        return work

    @property
    def holds_call(self) -> bool:
        """Whether a call is kept."""
        return self._held is not None

    def refuse_calls(self) -> None:
        """Drop all work; those who wait for an answer get one."""
        while (work := self.get()) is not None:
            if isinstance(work, Call):
                work.refuse()
