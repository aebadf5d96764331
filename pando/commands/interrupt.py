"""SIGINT, SIGTERM and SIGHUP as one exception in the main thread, raised once.

Knows nothing of what is interrupted. After the first signal further ones are ignored, so that no cleaning up is cut
short.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The process was asked to end; not an error, so no `except Exception` may stop it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals raise `Interrupted` inside; from the first one, or from the end of the block, they do nothing."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        ignore_signals()
        raise Interrupted(number)

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        ignore_signals()


def ignore_signals() -> None:
    """From here to the end of the process nobody interrupts."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
