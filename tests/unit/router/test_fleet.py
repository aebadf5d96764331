"""What the router believes: who is ready, who is refused, what is in flight where, and what is credited."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from kvstore.block import BlockKey
from kvstore.block_key import key_fingerprint
from router.fleet import WorkerState
from router.member import Reservation
from router.placement import Placement
from router.standing import CONTEXT_LENGTH, IS_DRAINING, KV_CAPACITY, NOT_READY, QUEUE_FULL, TRIED

pytestmark = pytest.mark.asyncio
Keys = Callable[[str, int], list[BlockKey]]
Stage = Any

OTHER_MODEL = b"o" * 16


def states(stage: Stage) -> dict[str, tuple[WorkerState, str]]:
    return {view.id: (view.state, view.reason) for view in stage.fleet.workers()}


def refusals(stage: Stage, **ask: Any) -> dict[str, str]:
    placement = stage.fleet.reserve(stage.ask(**ask))
    assert isinstance(placement, Placement)
    return dict(placement.excluded)


async def test_a_worker_is_ready_when_it_has_a_lease_and_a_link(stage: Stage) -> None:
    assert not stage.fleet.ready and stage.fleet.model_spec is None
    stage.mirror.say(stage.lease("a"))
    assert states(stage) == {"a": (WorkerState.CONNECTING, "connecting")}
    assert refusals(stage) == {"a": NOT_READY}
    stage.link("a").come_up()
    assert states(stage) == {"a": (WorkerState.READY, "")}
    assert stage.fleet.ready
    spec = stage.fleet.model_spec
    assert spec is not None and (spec.vocab_size, spec.max_model_len, spec.block_size) == (1000, 8192, 16)
    assert stage.reserve().worker == "a"


async def test_leases_that_were_there_before_are_taken_over(stage: Stage) -> None:
    await stage.fleet.stop()
    stage.mirror.say(stage.lease("a"))
    await stage.fleet.start()
    assert states(stage)["a"][0] is WorkerState.CONNECTING


@pytest.mark.parametrize("others", [{}, {"model": "another"}], ids=["all fit", "none fits"])
async def test_twice_the_workers_take_twice_the_calls_to_join(stage: Stage, others: dict[str, Any]) -> None:
    """No join looks at all who joined before; nor does a link that comes up where no worker is ready yet."""

    def join(first: int, end: int) -> int:
        calls = 0

        def count(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            calls += 1

        leases = [stage.lease(f"w{number}", **others) for number in range(first, end)]
        before = sys.getprofile()
        sys.setprofile(count)
        for lease in leases:
            stage.mirror.say(lease)
            stage.link(lease.worker_id)._on_change()
        sys.setprofile(before)
        return calls

    join(0, 10)
    few = join(10, 110)
    assert join(110, 210) < 1.1 * few


async def test_a_new_life_has_nothing_of_the_last_one_even_if_nobody_asked_in_between(
    stage: Stage, some_keys: Keys
) -> None:
    stage.add("a", "b")
    for _ in range(50):
        stage.reserve(some_keys("x", 6)).release()
    stage.now += 2.0
    other = stage.ask(some_keys("y", 6))
    busy = max(stage.fleet.candidates(other), key=lambda candidate: candidate.arrivals_per_s)
    assert busy.arrivals_per_s > 1.0
    stage.add(str(busy.worker), epoch=2)
    now = {candidate.worker: candidate.arrivals_per_s for candidate in stage.fleet.candidates(other)}
    assert len(set(now.values())) == 1 and now[busy.worker] < busy.arrivals_per_s


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"block_size": 32, "key_fingerprint": key_fingerprint(b"m" * 16, 32)}, "block size"),
        ({"key_fingerprint": "00" * 16}, "key fingerprint"),
        ({"model": "another"}, "serves another"),
        ({"model_fingerprint": "not hex"}, "key fingerprint"),
        (
            {"model_fingerprint": OTHER_MODEL.hex(), "key_fingerprint": key_fingerprint(OTHER_MODEL, 16)},
            "not the one that the fleet serves",
        ),
    ],
)
async def test_a_worker_that_differs_is_refused_with_a_reason(stage: Stage, changes: dict[str, Any], word: str) -> None:
    stage.add("good")
    stage.mirror.say(stage.lease("bad", **changes))
    state, reason = states(stage)["bad"]
    assert state is WorkerState.REFUSED and word in reason
    assert not hasattr(stage.link("bad"), "was_started")
    assert stage.reserve().worker == "good"
    stage.mirror.end("good")
    assert refusals(stage) == {"bad": NOT_READY} or word == "not the one that the fleet serves"


async def test_another_model_is_accepted_once_nobody_serves_the_old_one(stage: Stage) -> None:
    stage.add("old")
    other = {"model_fingerprint": OTHER_MODEL.hex(), "key_fingerprint": key_fingerprint(OTHER_MODEL, 16)}
    stage.mirror.say(stage.lease("new", **other))
    assert states(stage)["new"][0] is WorkerState.REFUSED
    stage.mirror.end("old")
    assert states(stage)["new"][0] is WorkerState.CONNECTING
    assert stage.fleet.model_spec.model_fingerprint == OTHER_MODEL


async def test_a_broken_link_or_an_ended_lease_takes_the_worker_out_at_once(stage: Stage) -> None:
    stage.add("a", "b")
    stage.link("a").break_off()
    assert {stage.reserve().worker for _ in range(4)} == {"b"}
    stage.mirror.end("b")
    assert not stage.fleet.ready
    assert set(states(stage)) == {"a"}
    stage.link("a").come_up()
    assert stage.reserve().worker == "a"


async def test_streams_outlive_an_ended_lease_as_long_as_the_link_does(stage: Stage, some_keys: Keys) -> None:
    stage.add("a")
    link = stage.link("a")
    link._streams[1] = object()
    stage.mirror.end("a")
    assert states(stage)["a"][0] is WorkerState.DRAINING
    assert refusals(stage) == {"a": IS_DRAINING}
    link._streams.clear()
    link.say_load()
    assert states(stage) == {}


async def test_a_new_epoch_closes_the_old_link_and_begins_empty(stage: Stage, some_keys: Keys) -> None:
    stage.add("a")
    old = stage.link("a")
    held = stage.reserve(some_keys("x", 6))
    stage.mirror.say(stage.lease("a", epoch=2))
    await asyncio.sleep(0)
    assert not old.live
    assert states(stage)["a"][0] is WorkerState.CONNECTING
    stage.link("a").come_up()
    again = stage.reserve(some_keys("x", 6))
    assert again.epoch == 2 and again.placement.predicted_cached == 0
    held.release()
    assert stage.fleet.num_reserved == 1


async def test_the_heartbeat_of_the_same_life_keeps_the_link(stage: Stage) -> None:
    stage.add("a")
    link = stage.link("a")
    stage.mirror.say(stage.lease("a", running=3, num_blocks=9))
    assert stage.link("a") is link and link.live
    stage.mirror.say(stage.lease("a", draining=True))
    assert states(stage)["a"][0] is WorkerState.DRAINING
    assert not stage.fleet.ready


async def test_each_way_not_to_fit_has_its_name(stage: Stage) -> None:
    stage.mirror.say(stage.lease("a", device_blocks=10, max_model_len=400, max_sequences=2, max_waiting=1))
    stage.link("a").come_up()
    assert refusals(stage, num_tokens=390, max_tokens=16) == {"a": CONTEXT_LENGTH}
    assert refusals(stage, num_tokens=146, max_tokens=16) == {"a": KV_CAPACITY}
    assert refusals(stage, avoid=frozenset({("a", 1)})) == {"a": TRIED}
    held = [stage.reserve(num_tokens=145, max_tokens=16) for _ in range(3)]
    assert refusals(stage) == {"a": QUEUE_FULL}
    held[0].release()
    stage.reserve()
    stage.link("a").say_load(draining=True)
    assert refusals(stage) == {"a": IS_DRAINING}


async def test_with_a_window_the_pool_bounds_no_length(stage: Stage) -> None:
    endless = {"device_blocks": 10, "max_model_len": 1 << 30}
    stage.mirror.say(stage.lease("fits", max_held=160, **endless))
    stage.mirror.say(stage.lease("fits-not", max_held=161, **endless))
    for worker in ("fits", "fits-not"):
        stage.link(worker).come_up()
    assert stage.reserve(num_tokens=10**6, max_tokens=10**9).worker == "fits"
    assert stage.reserve(num_tokens=100, avoid=frozenset({("fits", 1)})).worker == "fits-not"
    stage.mirror.end("fits")
    assert refusals(stage, num_tokens=10**6, max_tokens=10**9)["fits-not"] == KV_CAPACITY


async def test_a_worker_that_said_it_drains_is_left_alone_until_its_next_life(stage: Stage) -> None:
    stage.add("a", "b")
    stage.fleet.note_draining("a", 1)
    assert {stage.reserve().worker for _ in range(5)} == {"b"}
    stage.fleet.note_draining("b", 7)
    assert states(stage)["b"][0] is WorkerState.READY
    stage.mirror.say(stage.lease("a", epoch=2))
    stage.link("a").come_up()
    assert states(stage)["a"][0] is WorkerState.READY


async def test_the_longest_cached_prefix_is_found_and_one_token_is_left_to_compute(
    stage: Stage, some_keys: Keys
) -> None:
    stage.add("a", "b")
    keys = some_keys("x", 6)
    stage.store("b", keys)
    whole = stage.reserve(keys, num_tokens=96)
    assert (whole.worker, whole.placement.predicted_cached) == ("b", 80)
    assert stage.reserve(keys, num_tokens=97).placement.predicted_cached == 96


async def test_siblings_follow_a_prefix_that_is_being_computed(stage: Stage, some_keys: Keys) -> None:
    stage.add("a", "b", "c")
    keys = some_keys("cold", 128)
    held = [stage.reserve(keys, num_tokens=2049) for _ in range(16)]
    assert len({reservation.worker for reservation in held}) == 1
    assert held[0].placement.predicted_cached == 0
    assert {reservation.placement.predicted_cached for reservation in held[1:]} == {2048}
    for reservation in held:
        reservation.release()
    assert stage.reserve(keys, num_tokens=2049).placement.predicted_cached == 0


async def test_siblings_leave_when_their_queue_is_worse_than_computing_again(stage: Stage, some_keys: Keys) -> None:
    stage.add("a", "b")
    head = some_keys("cold", 8)
    held = [stage.reserve(head + some_keys(f"tail{i}-", 25), num_tokens=528) for i in range(40)]
    assert {reservation.worker for reservation in held} == {"a", "b"}


async def test_a_finished_prompt_is_credited_until_its_events_must_have_come(stage: Stage, some_keys: Keys) -> None:
    stage.add("a")
    keys = some_keys("x", 6)
    first = stage.reserve(keys)
    first.started()
    first.release()
    second = stage.reserve(keys)
    assert second.placement.predicted_cached == 96
    second.release()
    stage.now += 3
    assert stage.reserve(keys).placement.predicted_cached == 0


async def test_a_worker_that_keeps_no_prefix_gets_no_credit(stage: Stage, some_keys: Keys) -> None:
    stage.add("a", reuse=False)
    stage.reserve(some_keys("x", 6))
    assert stage.reserve(some_keys("x", 6)).placement.predicted_cached == 0


async def test_a_request_that_is_not_stored_is_no_sibling(stage: Stage, some_keys: Keys) -> None:
    stage.add("a")
    stage.reserve(some_keys("x", 6), stores=False)
    assert stage.reserve(some_keys("x", 6)).placement.predicted_cached == 0


async def test_own_requests_and_the_workers_report_count_each_token_once(stage: Stage) -> None:
    stage.add("a")

    def queued() -> int:
        return stage.fleet.workers()[0].queued_tokens

    first = stage.reserve(num_tokens=500)
    second = stage.reserve(num_tokens=300)
    assert queued() == 800
    stage.link("a").say_load(queued_tokens=800, prefill_tokens_per_s=1000.0)
    assert queued() == 800
    third = stage.reserve(num_tokens=200)
    assert queued() == 1000
    stage.link("a").say_load(queued_tokens=5000, prefill_tokens_per_s=1000.0)  # other routers' requests
    assert queued() == 5000
    stage.link("a").say_load(queued_tokens=0, prefill_tokens_per_s=1000.0)
    first.started()
    first.started()
    assert queued() == 500
    second.release()
    third.release()
    third.release()
    first.release()
    assert queued() == 0 and stage.fleet.num_reserved == 0


async def test_select_and_reserve_is_one_step_so_a_burst_spreads(stage: Stage, some_keys: Keys) -> None:
    stage.add("a", "b", "c", "d")
    held = [stage.reserve(some_keys(f"p{i}-", 30), num_tokens=490) for i in range(40)]
    counts = [sum(reservation.worker == worker for reservation in held) for worker in "abcd"]
    assert counts == [10, 10, 10, 10]


async def test_full_slots_cost_time(stage: Stage) -> None:
    for worker in "ab":
        stage.mirror.say(stage.lease(worker, max_sequences=2))
        stage.link(worker).come_up()
    held = [stage.reserve() for _ in range(4)]
    stage.now += 5
    for reservation in held[:2]:
        reservation.started()
    gone = next(reservation for reservation in held if reservation.worker == "a")
    gone.release()
    stage.link("b").say_load(running=2, prefill_tokens_per_s=20_000.0)
    stage.link("a").say_load(running=1, queued_tokens=2000, prefill_tokens_per_s=20_000.0)
    terms = {term.worker: term for term in stage.reserve().placement.terms}
    assert terms["a"].queue_s >= 0.1
    assert set(terms) == {"a", "b"}


async def test_waiting_for_a_ready_worker_ends_with_the_first(stage: Stage) -> None:
    assert not await stage.fleet.wait_ready(0.01)
    waiter = asyncio.create_task(stage.fleet.wait_ready(5))
    await asyncio.sleep(0)
    stage.add("a")
    assert await waiter


async def test_a_reservation_may_be_released_after_the_fleet_stopped(stage: Stage, some_keys: Keys) -> None:
    stage.add("a")
    held = stage.reserve(some_keys("x", 3))
    assert isinstance(held, Reservation)
    await stage.fleet.stop()
    held.release()
    assert stage.fleet.workers() == []


async def test_a_report_made_while_a_request_ran_counts_it_no_longer_than_it_runs(
    stage: Stage, some_keys: Keys
) -> None:
    stage.add("a", "b")
    keys = some_keys("k", 6)
    first = stage.reserve(keys)
    worker, member = first.worker, stage.fleet._members[first.worker]
    # Said in the middle of its prefill, and nothing after: the next report is due in a tenth of a second.
    stage.link(worker).say_load(running=1, waiting=0, queued_tokens=100, step_ms=20.0, prefill_tokens_per_s=20_000.0)
    # The step that runs is the one that computes the prompt: a part of the queue.
    assert (member.queued_tokens, member.in_flight(member.load), member.standing().step_s) == (100, 1, 0.0)
    first.started()
    assert (member.queued_tokens, member.standing().running, member.standing().step_s) == (0, 1, 0.02)
    first.release()
    standing = member.standing()
    assert (member.queued_tokens, standing.running, standing.in_flight, standing.step_s) == (0, 0, 0, 0.0)
    stage.store(worker, keys)
    assert stage.reserve(keys).worker == worker
    stage.link(worker).say_load(running=2, queued_tokens=30)
    assert member.queued_tokens == 30
