"""Why a request went where it did, asked before and after, and what a tenant's time to first token does to it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest

from pando.errors import ResourceExhausted
from pando.worker.v1 import worker_pb2 as pb
from router.recent import RecentPlacements
from tests.unit.router.test_dispatch import Call, begin, dispatch, is_clean, request, settle, submitted

pytestmark = pytest.mark.asyncio
Stage = Any
Tokens = Callable[[int], "array[int]"]


async def test_a_tenants_time_to_first_token_is_kept_or_refused_with_a_hint(stage: Stage, tokens: Tokens) -> None:
    stage.add("w")
    stage.link("w").say_load(queued_tokens=10_000, prefill_tokens_per_s=20_000.0)
    with pytest.raises(ResourceExhausted) as caught:
        await Call(dispatch(stage).stream(request(tokens(50), ttft_s=0.25))).task
    assert caught.value.reason == "TTFT" and caught.value.retry_after_s == pytest.approx(0.2525)
    assert stage.link("w").sent() == [] and is_clean(stage)
    call, submit, link = await begin(stage, tokens(50), ttft_s=0.6)
    link.say(submit.sequence, token_ids=[1], finish=pb.FINISH_LENGTH)
    assert len(await call.task) == 1


async def test_a_placement_can_be_asked_about_before_and_after(stage: Stage, tokens: Tokens) -> None:
    stage.add("v", "w")
    router = dispatch(stage)
    before = router.explain(request(tokens(50)))
    assert stage.fleet.num_reserved == 0 and router.recent.of("request") is None
    call = Call(router.stream(request(tokens(50))))
    await settle()
    submit, link = submitted(stage)
    recent = router.recent.of("request")
    assert recent is not None and recent.placement == before and recent.attempt == 1
    assert {terms.worker for terms in recent.placement.terms} == {"v", "w"} and recent.found_cached is None
    link.say(submit.sequence, token_ids=[1], finish=pb.FINISH_LENGTH, admission=pb.Admission(cached_device_tokens=7))
    await call.task
    after = router.recent.of("request")
    assert after is not None and after.found_cached == 7


async def test_recent_placements_are_bounded(stage: Stage) -> None:
    stage.add("w")
    placement = stage.fleet.explain(stage.ask())
    ring = RecentPlacements(most=3)
    for number in range(5):
        ring.add(f"r{number}", 1, placement)
    ring.add("r3", 2, placement)
    ring.found("r0", 5)
    known = [ring.of(f"r{number}") for number in range(5)]
    assert [recent and recent.attempt for recent in known] == [None, None, 1, 2, 1]
