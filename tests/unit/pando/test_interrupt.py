"""A signal as an exception: raised once, and not lost where Python drops what is raised."""

from __future__ import annotations

import signal
import time
import weakref
from collections.abc import Iterator

import pytest

from pando.commands.interrupt import Interrupted, interruptible

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Watched:
    """Something to refer to weakly."""


def test_the_first_signal_is_raised_and_a_second_one_cuts_nothing_short() -> None:
    with pytest.raises(Interrupted) as caught, interruptible():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 143


def test_what_a_callback_drops_is_raised_again() -> None:
    watched = [Watched()]
    dropping = weakref.ref(watched[0], lambda _: signal.raise_signal(signal.SIGINT))
    reached = False
    with pytest.raises(Interrupted) as caught, interruptible():
        watched.clear()
        reached = True  # the callback has raised, and nobody heard
        time.sleep(30)
    assert reached and dropping() is None
    assert caught.value.exit_code == 130
