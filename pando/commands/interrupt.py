"""SIGINT, SIGTERM and SIGHUP as one exception in the main thread, raised once.

Knows nothing of what is interrupted. After the first signal further ones are ignored, so that no cleaning up is cut
short. An exception that Python drops, for it met a finalizer or a weak reference's callback, is raised again.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 0.01


class Interrupted(BaseException):
    """The process was asked to end; not an error, so no `except Exception` may stop it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals raise `Interrupted` inside; from the first one, or from the end of the block, they do nothing."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        ignore_signals()
        raise Interrupted(number)

    report = sys.unraisablehook

    def raise_again(dropped: sys.UnraisableHookArgs) -> None:
        interrupted = dropped.exc_value
        if not isinstance(interrupted, Interrupted):
            report(dropped)
            return
        number = interrupted.number
        signal.signal(signal.SIGALRM, lambda _number, frame: interrupt(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report
        ignore_signals()


def ignore_signals() -> None:
    """From here to the end of the process nobody interrupts."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
