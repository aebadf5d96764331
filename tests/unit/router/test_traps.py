"""Traps that routers fall into: each a small fleet on which the mistake would show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

import pytest

from kvstore.block import BlockKey
from kvstore.block_key import key_fingerprint
from router.fleet import WorkerState
from router.link_messages import AdmissionReport
from router.member import Reservation
from router.placement import Placement
from router.standing import NOT_READY

pytestmark = pytest.mark.asyncio
Keys = Callable[[str, int], list[BlockKey]]
Stage = Any

RATE = 20_000.0


class Lane:
    """Workers that compute one prompt after another at `RATE`, keep every block and report ten times a second."""

    def __init__(self, stage: Stage, *workers: str) -> None:
        self._stage = stage
        self._free_at = dict.fromkeys(workers, stage.now)
        self._due: list[tuple[float, Reservation, list[BlockKey]]] = []
        self.placed: Counter[str] = Counter()
        self.computed: Counter[str] = Counter()
        self.ttft_s: list[float] = []

    def serve(self, keys: list[BlockKey], num_tokens: int) -> Reservation:
        stage, now = self._stage, self._stage.now
        for at, reservation, stored in sorted(self._due, key=lambda due: due[0]):
            if at <= now:
                stage.store(reservation.worker, stored)
                reservation.started(AdmissionReport(cached_device=reservation.placement.predicted_cached))
                reservation.release()
        self._due = [due for due in self._due if due[0] > now]
        reservation = stage.reserve(keys, num_tokens=num_tokens)
        worker, computed = reservation.worker, reservation.placement.uncached_tokens
        ends = max(now, self._free_at[worker]) + computed / RATE
        self._free_at[worker] = ends
        self._due.append((ends, reservation, list(keys)))
        self.placed[worker] += 1
        self.computed[worker] += computed
        self.ttft_s.append(ends - now)
        return reservation


async def test_a_head_that_every_request_shares_is_copied_as_often_as_its_load_wants(
    stage: Stage, some_keys: Keys
) -> None:
    """Copies wanted: the seconds of work that come each second, over what a worker should be kept busy."""
    workers = ("a", "b", "c", "d", "e", "f")
    stage.add(*workers)
    head = some_keys("head", 125)
    seconds_each, per_s = 400 / RATE, 150.0
    wanted = ceil(per_s * seconds_each / 0.7)
    lane = Lane(stage, *workers)
    for number in range(3000):
        lane.serve(head + some_keys(f"t{number}-", 25), 2401)
        stage.now += 1 / per_s
    copies = sum(found.num_blocks >= len(head) for found in stage.index.match(head).values())
    assert wanted == 5 and copies >= wanted
    late = sorted(lane.ttft_s[1500:])
    assert late[len(late) // 2] < 0.1, "the queue does not grow"
    assert max(lane.computed.values()) <= 1.3 * sum(lane.computed.values()) / len(workers)


async def test_a_cold_head_stays_where_it_is(stage: Stage, some_keys: Keys) -> None:
    stage.add("a", "b", "c", "d")
    head = some_keys("head", 125)
    lane = Lane(stage, "a", "b", "c", "d")
    for number in range(40):
        lane.serve(head + some_keys(f"t{number}-", 25), 2401)
        stage.now += 1.0
    assert len(lane.placed) == 1


async def test_affinity_goes_on_while_the_fleet_is_out_of_balance(stage: Stage, some_keys: Keys) -> None:
    """Others may be far more loaded than the holder, or it than others: the prefix counts all the same."""
    stage.add("a", "b", "c")
    keys = some_keys("x", 200)
    stage.store("b", keys)
    stage.link("a").say_load(queued_tokens=60_000, prefill_tokens_per_s=RATE)
    stage.link("b").say_load(queued_tokens=1_000, prefill_tokens_per_s=RATE)
    stage.link("c").say_load(queued_tokens=0, prefill_tokens_per_s=RATE)
    assert stage.reserve(keys, num_tokens=3201).worker == "b"
    stage.link("b").say_load(queued_tokens=20_000, prefill_tokens_per_s=RATE)
    assert stage.reserve(keys, num_tokens=3201).worker == "c"


async def test_a_holder_that_is_gone_does_not_send_requests_to_the_busiest_of_the_rest(
    stage: Stage, some_keys: Keys
) -> None:
    """The fallback weighs load as everything does; that a worker has the fewest blocks is no merit."""
    stage.add("a", "b", "gone")
    stage.store("gone", some_keys("x", 100))
    stage.store("b", some_keys("other", 100))
    stage.mirror.end("gone")
    stage.link("a").say_load(queued_tokens=9_000, running=3, prefill_tokens_per_s=RATE)
    assert stage.reserve(some_keys("x", 100), num_tokens=1601).worker == "b"


@pytest.mark.parametrize("way", ["answered", "cancelled in the queue", "cancelled after its start", "worker lost"])
async def test_every_way_a_request_ends_moves_the_same_counters(stage: Stage, some_keys: Keys, way: str) -> None:
    stage.add("a", "b")
    stage.link("b").say_load(queued_tokens=10**6, prefill_tokens_per_s=RATE)
    before = stage.fleet.candidates(stage.ask(some_keys("y", 9)))[0]
    held = [stage.reserve(some_keys(f"x{number}", 60), num_tokens=1000) for number in range(5)]
    during = stage.fleet.candidates(stage.ask(some_keys("y", 9)))[0]
    assert during.queued_tokens == 5000
    for reservation in held:
        if way in ("answered", "cancelled after its start"):
            reservation.started()
    if way != "cancelled in the queue" and way != "worker lost":
        assert stage.fleet.candidates(stage.ask(some_keys("y", 9)))[0].running == 5
    if way == "worker lost":
        stage.link("a").break_off()
    for reservation in held:
        reservation.release()
    if way == "worker lost":
        stage.link("a").come_up()
    after = stage.fleet.candidates(stage.ask(some_keys("y", 9)))[0]
    assert (after.queued_tokens, after.running, after.slot_wait_s) == (before.queued_tokens, 0, 0)
    assert stage.fleet.num_reserved == 0


async def test_one_bad_key_voids_nothing_before_it(stage: Stage, some_keys: Keys) -> None:
    stage.add("a", "b")
    keys = some_keys("x", 20)
    stage.store("b", keys)
    strange = [*keys[:15], BlockKey(b""), *some_keys("else", 4)]
    placed = stage.reserve(strange, num_tokens=400)
    assert (placed.worker, placed.placement.predicted_cached) == ("b", 240)


async def test_a_skew_of_keys_or_block_size_is_refused_and_never_a_silent_miss(stage: Stage) -> None:
    stage.mirror.say(stage.lease("size", block_size=32, key_fingerprint=key_fingerprint(b"m" * 16, 32)))
    stage.mirror.say(stage.lease("seed", key_fingerprint="00" * 16))
    assert {view.state for view in stage.fleet.workers()} == {WorkerState.REFUSED}
    answer = stage.fleet.reserve(stage.ask())
    assert isinstance(answer, Placement) and dict(answer.excluded) == {"seed": NOT_READY, "size": NOT_READY}


async def test_siblings_of_one_that_left_still_meet(stage: Stage, some_keys: Keys) -> None:
    stage.add("a", "b", "c")
    keys = some_keys("cold", 128)
    first, second = (stage.reserve(keys, num_tokens=2049) for _ in range(2))
    assert second.placement.chosen.plan == "wait"
    first.release()
    third = stage.reserve(keys, num_tokens=2049)
    assert (third.worker, third.placement.predicted_cached) == (second.worker, 2048)
    second.release()
    third.release()
    assert stage.reserve(keys, num_tokens=2049).placement.predicted_cached == 0


async def test_a_lying_index_is_believed_less_and_what_it_said_is_struck(stage: Stage, some_keys: Keys) -> None:
    stage.add("a", "b")
    keys = some_keys("x", 60)
    stage.store("a", keys)
    held = stage.reserve(keys, num_tokens=961, stores=False)
    assert held.placement.predicted_cached == 960
    stage.now += 0.05
    held.started(AdmissionReport(cached_device=160))
    held.release()
    assert stage.index.match(keys)["a"].device_blocks == 10
    candidate = stage.fleet.candidates(stage.ask(keys, num_tokens=961))[0]
    assert candidate.confidence == pytest.approx(160 / 960)
