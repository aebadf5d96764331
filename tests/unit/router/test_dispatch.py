"""The story of a request against links that a test feeds: order, fences, second tries, ends, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
from array import array
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kvstore.block_key import block_keys
from kvstore.scope import Region, TenantId, scope_root, tenant_scope
from pando.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    PandoError,
    ResourceExhausted,
    Unavailable,
)
from pando.worker.v1 import worker_pb2 as pb
from router.dispatch import Dispatch, SamplingChoice, TokenDelta, TokenRequest
from router.scopes import Scopes

pytestmark = pytest.mark.asyncio
Stage = Any
Tokens = Callable[[int], "array[int]"]

SECRET = b"secret"


def request(token_ids: array[int], tenant: str = "a", timeout_s: float = 5.0, **fields: Any) -> TokenRequest:
    deadline = asyncio.get_running_loop().time() + timeout_s
    sampling = fields.pop("sampling", SamplingChoice(max_tokens=8))
    return TokenRequest("request", TenantId(tenant), token_ids, sampling, deadline, **fields)


def dispatch(stage: Stage, **settings: Any) -> Dispatch:
    return Dispatch(stage.fleet, Scopes(SECRET), **settings)


class Call:
    """A stream that is read by a task of its own."""

    def __init__(self, deltas: AsyncIterator[TokenDelta]) -> None:
        self.deltas: list[TokenDelta] = []
        self.task = asyncio.create_task(self._read(deltas))

    async def _read(self, deltas: AsyncIterator[TokenDelta]) -> list[TokenDelta]:
        async with contextlib.aclosing(deltas) as stream:  # type: ignore[type-var]
            async for delta in stream:
                self.deltas.append(delta)
        return self.deltas


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def begin(stage: Stage, token_ids: array[int], **fields: Any) -> tuple[Call, pb.Submit, Any]:
    """A call that has reached a worker: the call, what was submitted, and the link it went to."""
    call = Call(dispatch(stage).stream(request(token_ids, **fields)))
    await settle()
    return call, *submitted(stage)


def submitted(stage: Stage) -> tuple[pb.Submit, Any]:
    for view in stage.fleet.workers():
        link = stage.link(view.id)
        for submit in link.submits():
            return submit, link
    raise AssertionError("nothing was submitted")


def is_clean(stage: Stage) -> bool:
    links = [stage.link(view.id) for view in stage.fleet.workers()]
    return stage.fleet.num_reserved == 0 and all(link.num_streams == 0 for link in links)


async def test_the_worker_gets_all_of_the_request_in_the_tenants_scope(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    sampling = SamplingChoice(9, 2, 0.5, 40, 0.9, 0.1, 2**63, (1, 2))
    call, submit, _ = await begin(stage, tokens(50), sampling=sampling, priority=-3, no_store=True)
    root = scope_root(SECRET, b"m" * 16, tenant_scope(TenantId("a")), block_size=16)
    assert [(region.scope_root, region.end) for region in submit.regions] == [(root, 0)]
    assert list(submit.token_ids) == list(tokens(50)) and submit.num_prompt_tokens == 50
    sent = submit.sampling
    assert (sent.max_tokens, sent.min_tokens, sent.top_k, sent.seed) == (9, 2, 40, 2**63)
    assert (sent.temperature, sent.top_p, sent.min_p) == pytest.approx((0.5, 0.9, 0.1))
    assert list(sent.stop_token_ids) == [1, 2]
    assert (submit.priority, submit.no_store, submit.attempt) == (-3, True, 1)
    assert 4000 < submit.deadline_ms <= 5000
    call.task.cancel()


async def test_deltas_come_in_order_and_the_first_says_what_was_cached(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    root = scope_root(SECRET, b"m" * 16, tenant_scope(TenantId("a")), block_size=16)
    stage.store("w", block_keys((Region(root, None),), tokens(50), 16))
    call, submit, link = await begin(stage, tokens(50))
    link.say(submit.sequence, token_ids=[5], admission=pb.Admission(cached_device_tokens=48, queue_ms=2.5))
    await settle()
    link.say(submit.sequence, first_index=1, token_ids=[6])
    link.say(submit.sequence, first_index=2, token_ids=[7], finish=pb.FINISH_STOP, stop_token_id=7)
    first, second = await call.task
    assert (first.token_ids, first.first_index, first.finish) == ((5,), 0, None)
    assert first.admission is not None and first.admission.cached_tokens == 48 and first.admission.queue_ms == 2.5
    assert (first.worker, first.attempts, first.predicted_cached) == ("w", 1, 48)
    # A reader that was slow finds what came meanwhile in one delta.
    assert (second.token_ids, second.first_index, second.finish, second.stop_token_id) == ((6, 7), 1, "stop", 7)
    assert second.admission is None
    assert is_clean(stage) and link.sent() == []


@pytest.mark.parametrize("begun", [False, True])
async def test_a_purge_ends_a_request_and_leaves_its_worker_in_place(stage: Stage, tokens: Tokens, begun: bool) -> None:
    stage.add("w")
    call, submit, link = await begin(stage, tokens(50))
    if begun:
        link.say(submit.sequence, token_ids=[5])
        await settle()
    link.say(submit.sequence, first_index=int(begun), finish=pb.FINISH_CANCELLED, reason="PURGED")
    with pytest.raises(Unavailable) as ended:
        await call.task
    assert (ended.value.reason, ended.value.retry_after_s) == ("PURGED", None)
    assert stage.fleet.ready and is_clean(stage)


async def test_tenants_share_nothing(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    call, submit, link = await begin(stage, tokens(50), tenant="a")
    other = Call(dispatch(stage).stream(request(tokens(50), tenant="b")))
    await settle()
    theirs, _ = submitted(stage)
    assert theirs.regions[0].scope_root != submit.regions[0].scope_root
    link.say(theirs.sequence, token_ids=[1], finish=pb.FINISH_LENGTH)
    assert (await other.task)[0].predicted_cached == 0
    call.task.cancel()


async def test_only_the_current_attempt_and_exactly_the_next_index_is_taken(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    call, submit, link = await begin(stage, tokens(5))
    link.say(submit.sequence, token_ids=[1, 2])
    link.say(submit.sequence, attempt=7, first_index=2, token_ids=[99])
    link.say(submit.sequence, first_index=0, token_ids=[1, 2])
    link.say(submit.sequence, first_index=2, token_ids=[3], finish=pb.FINISH_LENGTH)
    deltas = await call.task
    assert [token for delta in deltas for token in delta.token_ids] == [1, 2, 3]


async def test_a_skipped_token_is_an_error_not_a_hole(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    call, submit, link = await begin(stage, tokens(5))
    link.say(submit.sequence, token_ids=[1])
    await settle()
    link.say(submit.sequence, first_index=2, token_ids=[3])
    with pytest.raises(InternalError) as caught:
        await call.task
    assert caught.value.error_id
    assert link.sent()[-1].cancel.sequence == submit.sequence
    assert is_clean(stage)


@pytest.mark.parametrize("way", ["close", "cancel"])
async def test_leaving_cancels_at_the_worker(stage: Stage, tokens: Tokens, way: str) -> None:
    stage.add("w")
    stream = dispatch(stage).stream(request(tokens(40)))
    task = asyncio.ensure_future(anext(stream))
    await settle()
    submit, link = submitted(stage)
    if way == "close":
        link.say(submit.sequence, token_ids=[1])
        assert (await task).token_ids == (1,)
        await stream.aclose()  # type: ignore[attr-defined]
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [message.cancel.sequence for message in link.sent()] == [submit.sequence]
    assert is_clean(stage)
    link.say(submit.sequence, first_index=1, token_ids=[2])  # late, and nobody's


async def test_a_finished_stream_that_is_not_read_to_its_end_holds_nothing(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    stream = dispatch(stage).stream(request(tokens(40)))
    task = asyncio.ensure_future(anext(stream))
    await settle()
    submit, link = submitted(stage)
    link.say(submit.sequence, token_ids=[1], finish=pb.FINISH_LENGTH)
    assert (await task).finish == "length"
    assert is_clean(stage) and link.sent() == []
    await stream.aclose()  # type: ignore[attr-defined]


async def test_the_deadline_ends_it_here_and_at_the_worker(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    call, submit, link = await begin(stage, tokens(5), timeout_s=0.05)
    link.say(submit.sequence, token_ids=[1])
    with pytest.raises(DeadlineExceeded):
        await call.task
    assert call.deltas[0].token_ids == (1,)
    assert link.sent()[-1].cancel.sequence == submit.sequence
    assert is_clean(stage)


async def test_nothing_is_sent_after_the_deadline(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    with pytest.raises(DeadlineExceeded):
        await Call(dispatch(stage).stream(request(tokens(5), timeout_s=-1))).task
    assert stage.link("w").sent() == []


async def test_without_a_worker_it_waits_a_little_then_says_when_to_come_again(stage: Stage, tokens: Tokens) -> None:
    with pytest.raises(Unavailable) as caught:
        await Call(dispatch(stage, ready_grace_s=0.05).stream(request(tokens(5)))).task
    assert caught.value.retry_after_s
    with pytest.raises(DeadlineExceeded):
        await Call(dispatch(stage).stream(request(tokens(5), timeout_s=0.05))).task
    call = Call(dispatch(stage).stream(request(tokens(5))))
    await settle()
    stage.add("w")
    await settle()
    submit, link = submitted(stage)
    link.say(submit.sequence, token_ids=[1], finish=pb.FINISH_LENGTH)
    assert len(await call.task) == 1


async def test_a_worker_lost_before_the_first_token_is_replaced(stage: Stage, tokens: Tokens) -> None:
    stage.add("v", "w")
    call, _, link = await begin(stage, tokens(50))
    link.break_off()
    await settle()
    second, other = submitted(stage)
    assert other is not link and second.attempt == 2
    other.say(second.sequence, attempt=1, token_ids=[9])  # an attempt that is over
    other.say(second.sequence, attempt=2, token_ids=[1], finish=pb.FINISH_LENGTH)
    (delta,) = await call.task
    assert (delta.token_ids, delta.attempts) == ((1,), 2)
    assert is_clean(stage)


async def test_three_lost_workers_are_enough(stage: Stage, tokens: Tokens) -> None:
    stage.add("t", "u", "v", "w")
    call = Call(dispatch(stage).stream(request(tokens(50))))
    for _ in range(3):
        await settle()
        submitted(stage)[1].break_off()
    with pytest.raises(Unavailable):
        await call.task
    assert stage.fleet.ready and is_clean(stage)


async def test_a_worker_lost_after_the_first_token_is_a_clear_error(stage: Stage, tokens: Tokens) -> None:
    stage.add("v", "w")
    call, submit, link = await begin(stage, tokens(50))
    link.say(submit.sequence, token_ids=[1])
    await settle()
    link.say(submit.sequence, first_index=1, token_ids=[2])
    link.break_off()
    with pytest.raises(Unavailable, match="incomplete") as caught:
        await call.task
    assert caught.value.reason == "WORKER_LOST"
    assert [delta.token_ids for delta in call.deltas] == [(1,), (2,)]
    assert is_clean(stage)


@pytest.mark.parametrize(
    ("finish", "reason", "error"),
    [
        (pb.FINISH_REJECTED, "CONTEXT_LENGTH", InvalidRequest),
        (pb.FINISH_REJECTED, "KV_CAPACITY", InvalidRequest),
        (pb.FINISH_REJECTED, "MALFORMED", InternalError),
        (pb.FINISH_ERROR, "RUNNER_ERROR", InternalError),
        (pb.FINISH_DEADLINE, "", DeadlineExceeded),
    ],
)
async def test_ends_that_no_other_worker_would_change(
    stage: Stage, tokens: Tokens, finish: pb.Finish, reason: str, error: type[PandoError]
) -> None:
    stage.add("v", "w")
    call, submit, link = await begin(stage, tokens(50))
    link.say(submit.sequence, finish=finish, reason=reason)
    with pytest.raises(error) as caught:
        await call.task
    assert type(caught.value) is error
    assert is_clean(stage) and link.sent() == []


async def test_tokens_before_a_failure_still_arrive(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    call, submit, link = await begin(stage, tokens(50))
    link.say(submit.sequence, token_ids=[1])
    link.say(submit.sequence, first_index=1, token_ids=[2], finish=pb.FINISH_ERROR, reason="RUNNER_ERROR")
    with pytest.raises(InternalError):
        await call.task
    assert [token for delta in call.deltas for token in delta.token_ids] == [1, 2]


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        (pb.FINISH_REJECTED, "DRAINING"),
        (pb.FINISH_REJECTED, "QUEUE_FULL"),
        (pb.FINISH_ERROR, "WORKER_STOPPED"),
        (pb.FINISH_CANCELLED, ""),
    ],
)
async def test_ends_that_another_worker_can_make_good(
    stage: Stage, tokens: Tokens, finish: pb.Finish, reason: str
) -> None:
    stage.add("v", "w")
    call, submit, link = await begin(stage, tokens(50))
    link.say(submit.sequence, finish=finish, reason=reason)
    await settle()
    second, other = submitted(stage)
    assert other is not link
    other.say(second.sequence, attempt=2, token_ids=[1], finish=pb.FINISH_LENGTH)
    assert (await call.task)[0].attempts == 2
    assert is_clean(stage)


async def test_full_queues_everywhere_are_said_so(stage: Stage, tokens: Tokens) -> None:
    stage.add("v", "w")
    call = Call(dispatch(stage).stream(request(tokens(50))))
    for attempt in (1, 2):
        await settle()
        submit, link = submitted(stage)
        link.say(submit.sequence, attempt=attempt, finish=pb.FINISH_REJECTED, reason="QUEUE_FULL")
    with pytest.raises(ResourceExhausted) as caught:
        await call.task
    assert caught.value.retry_after_s and is_clean(stage)


async def test_a_full_worker_that_refused_a_tenant_is_not_asked_again_at_once(stage: Stage, tokens: Tokens) -> None:
    stage.mirror.say(stage.lease("w", max_sequences=2, max_waiting=2))
    stage.link("w").come_up()
    stage.link("w").say_load(running=2, waiting=2)
    for tenant in ("acme", "other"):
        call, submit, link = await begin(stage, tokens(50), tenant=TenantId(tenant))
        link.say(submit.sequence, finish=pb.FINISH_REJECTED, reason="QUEUE_FULL")
        with pytest.raises(ResourceExhausted):
            await call.task
        with pytest.raises(ResourceExhausted):
            await Call(dispatch(stage).stream(request(tokens(50), tenant=TenantId(tenant)))).task
        assert not stage.link("w").submits()
    assert is_clean(stage)


async def test_what_fits_no_worker_is_refused_before_it_is_sent(stage: Stage, tokens: Tokens) -> None:
    stage.mirror.say(stage.lease("w", device_blocks=4, max_model_len=100))
    stage.link("w").come_up()
    with pytest.raises(InvalidRequest) as caught:
        await Call(dispatch(stage).stream(request(tokens(95)))).task
    assert caught.value.reason == "CONTEXT_LENGTH"
    with pytest.raises(InvalidRequest) as caught:
        await Call(dispatch(stage).stream(request(tokens(80)))).task
    assert caught.value.reason == "KV_CAPACITY"


async def test_random_cancels_leave_nothing(stage: Stage, tokens: Tokens) -> None:
    rng = random.Random(5)
    stage.add("u", "v", "w")
    before = len(asyncio.all_tasks())
    calls = [
        Call(dispatch(stage).stream(request(tokens(rng.randrange(1, 90)), tenant=f"t{i % 3}"))) for i in range(200)
    ]
    open_at: dict[str, dict[int, int]] = {"u": {}, "v": {}, "w": {}}
    for _ in range(300):
        await asyncio.sleep(0)
        for worker, sequences in open_at.items():
            link = stage.link(worker)
            for message in link.sent():
                if message.HasField("submit"):
                    sequences[message.submit.sequence] = 0
                else:
                    sequences.pop(message.cancel.sequence, None)
            for sequence in list(sequences):
                if rng.random() < 0.2:
                    index = sequences[sequence]
                    sequences[sequence] += 1
                    finish = pb.FINISH_LENGTH if index == 7 else pb.FINISH_NONE
                    link.say(sequence, first_index=index, token_ids=[index], finish=finish)
                    if index == 7:
                        del sequences[sequence]
        rng.choice(calls).task.cancel()
    for call in calls:
        call.task.cancel()
    await asyncio.gather(*(call.task for call in calls), return_exceptions=True)
    outcomes = [call.task.cancelled() for call in calls]
    assert any(outcomes) and not all(outcomes)
    assert is_clean(stage)
    assert all(view.queued_tokens == 0 for view in stage.fleet.workers())
    assert len(asyncio.all_tasks()) == before
    for worker, sequences in open_at.items():
        cancelled = {message.cancel.sequence for message in stage.link(worker).sent()}
        assert set(sequences) <= cancelled
