"""A step that runs on a thread of its own.

Knows a future and nothing of what the step does.
"""

from __future__ import annotations

from concurrent.futures import Future


class ThreadStep:
    """Implements `StepInFlight`."""

    def __init__(self, future: Future[list[int]]) -> None:
        self._future = future

    def wait(self, timeout_s: float) -> bool:
        """Whether the thread is done with it, after so long at most."""
        try:
            self._future.exception(max(0.0, timeout_s))
        except TimeoutError:
            return False
        return True

    def tokens(self) -> list[int]:
        """Wait for the thread; raises what the step raised."""
        return self._future.result()
