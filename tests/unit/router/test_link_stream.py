"""The outputs of a submission between the link and the one task that reads them: none lost, none twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pando.worker.v1 import worker_pb2 as pb
from router.link_messages import AdmissionReport, LinkOutput, link_output
from router.worker_link import LinkStream, WorkerLost

pytestmark = pytest.mark.asyncio


def output(index: int) -> LinkOutput:
    return LinkOutput(fork=0, attempt=1, first_index=index, token_ids=(index,))


async def waiting(stream: LinkStream) -> asyncio.Task[list[LinkOutput]]:
    task = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_a_reader_gets_all_that_came_since_it_looked() -> None:
    stream = LinkStream((1,))
    reader = await waiting(stream)
    stream._put(output(0))
    stream._put(output(1))
    assert await reader == [output(0), output(1)]
    stream._put(output(2))
    assert await stream.take() == [output(2)]
    await waiting(stream)


async def test_a_reader_that_gives_up_loses_nothing() -> None:
    stream = LinkStream((1,))
    reader = await waiting(stream)
    reader.cancel()
    stream._put(output(0))
    with pytest.raises(asyncio.CancelledError):
        await reader
    stream._put(output(1))
    assert await stream.take() == [output(0), output(1)]


async def test_a_lost_worker_is_told_after_what_it_said() -> None:
    stream = LinkStream((1,))
    stream._put(output(0))
    stream._lose()
    assert await stream.take() == [output(0)]
    for _ in range(2):
        with pytest.raises(WorkerLost):
            await stream.take()


async def test_a_waiting_reader_hears_of_a_lost_worker() -> None:
    stream = LinkStream((1,))
    reader = await waiting(stream)
    stream._lose()
    with pytest.raises(WorkerLost):
        await reader


async def test_an_ended_wait_gives_what_is_there_and_waits_no_more() -> None:
    stream = LinkStream((1,))
    reader = await waiting(stream)
    stream.end_wait()
    assert await reader == []
    stream._put(output(0))
    assert await stream.take() == [output(0)]
    assert await stream.take() == []


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {}),
        ({"finish": pb.FINISH_STOP, "stop_token_id": 9}, {"finish": "stop", "stop_token_id": 9}),
        ({"finish": pb.FINISH_LENGTH, "stop_token_id": 9}, {"finish": "length"}),
        ({"finish": pb.FINISH_REJECTED, "reason": "WHY"}, {"finish": "rejected", "reason": "WHY"}),
        (
            {"admission": pb.Admission(cached_device_tokens=16, pull_ms=500)},
            {"admission": AdmissionReport(cached_device=16, pull_s=0.5)},
        ),
    ],
)
async def test_what_a_worker_says_is_read_whole(said: dict[str, Any], expected: dict[str, Any]) -> None:
    message = pb.SequenceOutput(sequence=7, attempt=2, first_index=3, token_ids=[4, 5], **said)
    assert link_output(message, 1) == LinkOutput(1, 2, 3, (4, 5), **expected)
