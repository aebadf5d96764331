"""Several answers to one prompt: one request to one worker, a stream and an end of its own for each."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.scope import TenantId
from pando.errors import DeadlineExceeded, InternalError, PandoError, ResourceExhausted, Unavailable
from pando.worker.v1 import worker_pb2 as pb
from router.dispatch import Dispatch, SamplingChoice, Story, TokenDelta, TokenRequest
from router.scopes import Scopes

pytestmark = pytest.mark.asyncio
Stage = Any
Tokens = Callable[[int], "array[int]"]

SEEDS = (7, 100, 200)


def begin(stage: Stage, token_ids: array[int], timeout_s: float = 5.0, **fields: Any) -> Story:
    """A story of three answers."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    sampling = SamplingChoice(max_tokens=8, seed=SEEDS[0])
    request = TokenRequest("r", TenantId("a"), token_ids, sampling, deadline, fork_seeds=SEEDS[1:], **fields)
    return Dispatch(stage.fleet, Scopes(b"secret")).stream(request)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def submitted(stage: Stage) -> tuple[pb.Submit, list[int], Any]:
    """What reached a worker, the numbers of its sequences, and the link."""
    await settle()
    for view in stage.fleet.workers():
        link = stage.link(view.id)
        for submit in link.submits():
            return submit, [submit.sequence, *(fork.sequence for fork in submit.forks)], link
    raise AssertionError("nothing was submitted")


def read(story: Story) -> asyncio.Task[list[TokenDelta]]:
    async def all_of_it() -> list[TokenDelta]:
        return [delta async for delta in story]

    return asyncio.create_task(all_of_it())


def cancelled(link: Any) -> list[int]:
    return [message.cancel.sequence for message in link.sent() if message.HasField("cancel")]


def is_clean(stage: Stage) -> bool:
    links = [stage.link(view.id) for view in stage.fleet.workers()]
    idle = all(view.queued_tokens == 0 for view in stage.fleet.workers())
    return idle and stage.fleet.num_reserved == 0 and all(link.num_streams == 0 for link in links)


async def test_one_submit_asks_for_all_with_the_seeds_of_each(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    reader = read(begin(stage, tokens(50)))
    submit, numbers, link = await submitted(stage)
    assert link.submits() == [] and len(set(numbers)) == 3 == link.num_streams
    assert [submit.sampling.seed, *(fork.seed for fork in submit.forks)] == list(SEEDS)
    for number in reversed(numbers):
        link.say(number, token_ids=[number], finish=pb.FINISH_LENGTH)
    deltas = await reader
    assert {delta.index: delta.token_ids for delta in deltas} == {i: (number,) for i, number in enumerate(numbers)}
    assert is_clean(stage) and link.sent() == []


async def test_all_answers_are_in_flight_and_the_prompt_waits_once(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    reader = read(begin(stage, tokens(50)))
    _, numbers, link = await submitted(stage)
    (view,) = stage.fleet.workers()
    assert (stage.fleet.num_reserved, view.queued_tokens) == (3, 50)
    member = stage.fleet._members["w"]
    assert member.in_flight(member.load) == 3
    link.say(numbers[1], token_ids=[1], finish=pb.FINISH_LENGTH)
    await settle()
    (view,) = stage.fleet.workers()
    assert (stage.fleet.num_reserved, view.queued_tokens, member.in_flight(member.load)) == (2, 0, 2)
    for number in (numbers[0], numbers[2]):
        link.say(number, token_ids=[1], finish=pb.FINISH_LENGTH)
    await reader
    assert is_clean(stage) and member.in_flight(member.load) == 0


async def test_each_answer_has_its_own_order_and_fence(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    story = begin(stage, tokens(5))
    reader = read(story)
    _, numbers, link = await submitted(stage)
    link.say(numbers[0], token_ids=[1, 2], admission=pb.Admission(cached_device_tokens=3))
    link.say(numbers[1], token_ids=[5])
    link.say(numbers[0], first_index=0, token_ids=[1, 2])  # again
    link.say(numbers[2], attempt=4, token_ids=[9])
    await settle()
    link.say(numbers[1], first_index=1, token_ids=[6], finish=pb.FINISH_LENGTH)
    link.say(numbers[2], token_ids=[8], finish=pb.FINISH_STOP, stop_token_id=8)
    link.say(numbers[0], first_index=2, token_ids=[3], finish=pb.FINISH_LENGTH)
    deltas = await reader
    found = {i: [token for delta in deltas if delta.index == i for token in delta.token_ids] for i in range(3)}
    assert found == {0: [1, 2, 3], 1: [5, 6], 2: [8]}
    assert [delta.admission is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert [delta.stop_token_id for delta in deltas if delta.index == 2] == [8]


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_an_answer_that_is_dropped_ends_alone(stage: Stage, tokens: Tokens, index: int) -> None:
    stage.add("w")
    story = begin(stage, tokens(5))
    first = asyncio.ensure_future(anext(story))
    _, numbers, link = await submitted(stage)
    link.say(numbers[index], token_ids=[1])
    assert (await first).index == index
    link.say(numbers[index], first_index=1, token_ids=[2])  # on its way already
    story.drop(index)
    story.drop(index)
    assert cancelled(link) == [numbers[index]] and stage.fleet.num_reserved == 2
    others = [number for number in numbers if number != numbers[index]]
    for number in others:
        link.say(number, token_ids=[3], finish=pb.FINISH_LENGTH)
    assert [(delta.index, delta.finish) async for delta in story] == [(numbers.index(n), "length") for n in others]
    assert is_clean(stage) and link.sent() == []


async def test_dropping_all_ends_it(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    story = begin(stage, tokens(5))
    first = asyncio.ensure_future(anext(story))
    _, numbers, link = await submitted(stage)
    link.say(numbers[0], token_ids=[1])
    await first
    for index in range(3):
        story.drop(index)
    assert sorted(cancelled(link)) == numbers and is_clean(stage)
    assert [delta async for delta in story] == []


@pytest.mark.parametrize("way", ["close", "cancel"])
async def test_leaving_cancels_what_still_runs(stage: Stage, tokens: Tokens, way: str) -> None:
    stage.add("w")
    story = begin(stage, tokens(5))
    first = asyncio.ensure_future(anext(story))
    _, numbers, link = await submitted(stage)
    link.say(numbers[1], token_ids=[1], finish=pb.FINISH_LENGTH)
    await first
    waits = asyncio.ensure_future(anext(story))
    await settle()
    if way == "cancel":
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
    else:
        waits.cancel()
        await story.aclose()
        await asyncio.gather(waits, return_exceptions=True)
    assert cancelled(link) == [numbers[0], numbers[2]] and is_clean(stage)
    assert [delta async for delta in story] == []


async def test_the_deadline_ends_all(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    reader = read(begin(stage, tokens(5), timeout_s=0.05))
    _, numbers, link = await submitted(stage)
    link.say(numbers[2], token_ids=[1])
    with pytest.raises(DeadlineExceeded):
        await reader
    assert cancelled(link) == numbers and is_clean(stage)


async def test_a_worker_lost_before_the_first_token_is_replaced_for_all(stage: Stage, tokens: Tokens) -> None:
    stage.add("v", "w")
    reader = read(begin(stage, tokens(50)))
    _, _, link = await submitted(stage)
    link.break_off()
    second, numbers, other = await submitted(stage)
    assert other is not link and (second.attempt, stage.fleet.num_reserved) == (2, 3)
    assert [second.sampling.seed, *(fork.seed for fork in second.forks)] == list(SEEDS)
    for number in numbers:
        other.say(number, attempt=2, token_ids=[1], finish=pb.FINISH_LENGTH)
    assert [delta.attempts for delta in await reader] == [2, 2, 2]
    assert is_clean(stage)


async def test_answers_that_are_complete_are_not_asked_for_again(stage: Stage, tokens: Tokens) -> None:
    stage.add("v", "w")
    reader = read(begin(stage, tokens(50)))
    _, numbers, link = await submitted(stage)
    link.say(numbers[1], token_ids=[1], finish=pb.FINISH_LENGTH)
    await settle()
    link.break_off()
    second, numbers, other = await submitted(stage)
    assert [second.sampling.seed, *(fork.seed for fork in second.forks)] == [SEEDS[0], SEEDS[2]]
    for number in numbers:
        other.say(number, attempt=2, token_ids=[2], finish=pb.FINISH_LENGTH)
    assert [(delta.index, delta.token_ids) for delta in await reader] == [(1, (1,)), (0, (2,)), (2, (2,))]
    assert is_clean(stage)


async def test_a_worker_lost_in_the_middle_of_one_answer_is_a_clear_error(stage: Stage, tokens: Tokens) -> None:
    stage.add("v", "w")
    reader = read(begin(stage, tokens(50)))
    _, numbers, link = await submitted(stage)
    link.say(numbers[2], token_ids=[1])
    link.break_off()
    with pytest.raises(Unavailable, match="incomplete"):
        await reader
    assert is_clean(stage)


@pytest.mark.parametrize(
    ("finish", "reason", "error"),
    [
        (pb.FINISH_ERROR, "RUNNER_ERROR", InternalError),
        (pb.FINISH_DEADLINE, "", DeadlineExceeded),
    ],
)
async def test_one_that_fails_ends_all_after_what_was_said(
    stage: Stage, tokens: Tokens, finish: pb.Finish, reason: str, error: type[PandoError]
) -> None:
    stage.add("w")
    story = begin(stage, tokens(50))
    first = asyncio.ensure_future(anext(story))
    _, numbers, link = await submitted(stage)
    link.say(numbers[2], finish=finish, reason=reason)
    link.say(numbers[0], token_ids=[1])
    assert (await first).token_ids == (1,)
    with pytest.raises(error):
        await anext(story)
    assert cancelled(link) == numbers[:2] and is_clean(stage)


async def test_a_full_queue_sends_all_to_another_worker(stage: Stage, tokens: Tokens) -> None:
    stage.add("v", "w")
    reader = read(begin(stage, tokens(50)))
    for attempt in (1, 2):
        _, numbers, link = await submitted(stage)
        for number in numbers:
            link.say(number, attempt=attempt, finish=pb.FINISH_REJECTED, reason="QUEUE_FULL")
    with pytest.raises(ResourceExhausted):
        await reader
    assert is_clean(stage)
