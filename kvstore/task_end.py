"""The end of a task that talks to Redis: one cancellation may not be enough.

Knows nothing of what the task does. Invariant: when `end` returns, the task has ended.
"""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.2


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel a task until it has ended, and let its exception be: `asyncio.wait_for` in Python 3.11, which redis-py
    sends with, can swallow a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=AGAIN_S)
    await asyncio.gather(task, return_exceptions=True)
