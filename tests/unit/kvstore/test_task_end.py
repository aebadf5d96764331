"""A task that swallows cancellations ends all the same."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.task_end import end

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("swallowed", [0, 1, 3])
async def test_it_is_over_when_end_returns(swallowed: int) -> None:
    seen = 0

    async def work() -> None:
        nonlocal seen
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen += 1
                if seen > swallowed:
                    raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await end(task)
    assert task.done() and seen == swallowed + 1


async def test_an_error_at_the_end_stays_inside() -> None:
    async def work() -> None:
        raise ValueError

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await end(task)
    assert isinstance(task.exception(), ValueError)
