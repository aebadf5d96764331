"""A step that was given to a device: its tokens are on their way to the host.

Knows one tensor. Where the device is the CPU they are there already.
"""

from __future__ import annotations

import time
from typing import Any

import torch

# Its constructors have no types.
_CUDA: Any = torch.cuda

POLL_S = 5e-5


class StreamStep:
    """Implements `StepInFlight` for `drawn`, int64, the last that the step computes on the current stream."""

    def __init__(self, drawn: torch.Tensor) -> None:
        self._event: Any = None
        self._host = drawn
        if drawn.is_cuda:
            self._host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
            self._host.copy_(drawn, non_blocking=True)
            self._event = torch.cuda.current_stream(drawn.device).record_event(_CUDA.Event(blocking=True))

    def wait(self, timeout_s: float) -> bool:
        """Whether the tokens are there, after so long at most. There is no waiting for an event with a time limit."""
        until = time.monotonic() + timeout_s
        while self._event is not None and not self._event.query():
            left = until - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, POLL_S))
        return True

    def tokens(self) -> list[int]:
        """Wait for the copy; raises what the device found wrong."""
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._host.tolist()
        return found
