"""A full worker at the router: a flood is kept off, who has little there may ask, and the worker has the last word."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.scope import ScopeRoot
from router.member import Reservation
from router.placement import Placement
from router.standing import QUEUE_FULL

pytestmark = pytest.mark.asyncio

A, B, C = (ScopeRoot(name.encode() * 16) for name in "abc")
PLACES = 10


def filled(stage: Any, *names: str) -> None:
    for name in names:
        stage.mirror.say(stage.lease(name, max_sequences=2, max_waiting=PLACES - 2))
        stage.link(name).come_up()


def tried(stage: Any, owner: ScopeRoot, weight: int = 1) -> Reservation | None:
    """A place, or None where the router itself says that all queues are full."""
    answer = stage.fleet.reserve(stage.ask(owner=owner, weight=weight))
    if isinstance(answer, Placement):
        assert {reason for _, reason in answer.excluded} == {QUEUE_FULL}
        return None
    assert isinstance(answer, Reservation)
    return answer


async def test_a_flood_is_kept_off_and_another_owner_is_not(stage: Any) -> None:
    filled(stage, "w")
    assert all(tried(stage, A) for _ in range(PLACES))
    assert tried(stage, A) is None
    assert tried(stage, B) is not None


@pytest.mark.parametrize(("weight", "part"), [(1, 5), (4, 8), (9, 9)])
async def test_each_may_ask_up_to_its_part_by_weight(stage: Any, weight: int, part: int) -> None:
    filled(stage, "w")
    assert all(tried(stage, A) for _ in range(PLACES))
    inside = 0
    while tried(stage, B, weight) is not None:
        inside += 1
    assert inside == part


async def test_what_others_fill_is_no_reason_to_keep_the_little_one_off(stage: Any) -> None:
    filled(stage, "w")
    stage.link("w").say_load(running=2, waiting=PLACES)
    assert tried(stage, B) is not None


async def test_after_a_refusal_the_worker_is_left_alone_until_it_reports(stage: Any) -> None:
    filled(stage, "v", "w")
    full = {"running": 2, "waiting": PLACES}
    for name in ("v", "w"):
        stage.link(name).say_load(**full)
    for _ in range(2):
        held = tried(stage, B)
        assert held is not None
        held.refused()
        held.release()
    assert tried(stage, B) is None
    assert tried(stage, C) is not None
    stage.link("v").say_load(**full)
    again = tried(stage, B)
    assert again is not None and again.worker == "v"


async def test_who_leaves_is_counted_no_more(stage: Any) -> None:
    filled(stage, "w")
    held = [tried(stage, A) for _ in range(PLACES)]
    several = stage.reserve(owner=B, num_answers=5)
    assert tried(stage, B) is None
    several.end_answer()
    assert tried(stage, B) is not None
    several.release()
    for one in held:
        assert one is not None
        one.release()
    assert tried(stage, A) is not None
