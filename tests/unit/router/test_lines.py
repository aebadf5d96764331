"""How much of a queue is ahead of a request: a worker serves its owners by their weights, so whose it is matters."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from kvstore.block import WorkerId
from kvstore.scope import ScopeRoot
from router.lines import owner_of
from router.member import Reservation
from router.peers import PeerLoads, SentLoad
from router.placement import TOO_SLOW, Candidate, Prompt, Terms, place

HEAVY, LIGHT = ScopeRoot(b"h" * 16), ScopeRoot(b"l" * 16)
WEIGHTS = {HEAVY: 4, LIGHT: 1}


def sent(**tokens: int) -> SentLoad:
    """Another router's requests at one worker: prompt tokens of each owner."""
    roots = {"heavy": HEAVY, "light": LIGHT}
    line = tuple((owner_of(roots[name]), WEIGHTS[roots[name]], number) for name, number in tokens.items())
    return SentLoad(1, sum(tokens.values()), len(tokens), waiting=len(tokens), line=line)


def terms(stage: Any, owner: ScopeRoot, **fields: Any) -> dict[str, Terms]:
    placement = stage.fleet.explain(stage.ask(owner=owner, weight=WEIGHTS[owner], **fields))
    return {row.worker: row for row in placement.terms}


def full(stage: Any, *workers: str) -> None:
    """These workers have no place for more, and somebody waits for one."""
    stage.add(*workers)
    for worker in workers:
        stage.link(worker).say_load(waiting=1, prefill_tokens_per_s=20_000.0)


def test_what_is_ahead_scales_the_waits_alone() -> None:
    whole = Candidate(WorkerId("w"), 0, 5000, 10_000.0, 0.2, 3.0, arrivals_per_s=0.5, utilization=0.5)
    prompt = Prompt(1000, 16, b"key")
    alone, among = (place(prompt, [one]).chosen for one in (whole, replace(whole, ahead=0.25)))
    assert alone is not None and among is not None
    assert (among.queue_s, among.slot_s) == pytest.approx((alone.queue_s / 4, alone.slot_s / 4))
    assert (among.step_s, among.plan_s, among.behind_s) == (alone.step_s, alone.plan_s, alone.behind_s)


@pytest.mark.asyncio
async def test_who_waits_alone_has_all_of_the_queue_ahead(stage: Any) -> None:
    stage.add("a", "b")
    stage.fleet.peers.take([{"a": sent(light=4000), "b": sent(light=1000)}])
    assert terms(stage, LIGHT)["a"].queue_s == pytest.approx(4000 / 20_000)
    assert terms(stage, LIGHT)["b"].queue_s == pytest.approx(1000 / 20_000)


@pytest.mark.asyncio
async def test_what_others_have_over_their_part_is_not_ahead(stage: Any) -> None:
    full(stage, "a")
    stage.fleet.peers.take([{"a": sent(heavy=1_000_000, light=10_000)}])
    # Each token of the light one's goes with four of the heavy one's; the request itself is among them.
    assert terms(stage, LIGHT)["a"].queue_s == pytest.approx(5 * 10_000 / 20_000, rel=0.02)
    assert terms(stage, HEAVY)["a"].queue_s == pytest.approx(1_010_000 / 20_000)


@pytest.mark.asyncio
async def test_where_there_is_room_for_all_who_come_first_is_served_first(stage: Any) -> None:
    stage.add("a")
    stage.fleet.peers.take([{"a": sent(heavy=1_000_000, light=10_000)}])
    assert terms(stage, LIGHT)["a"].queue_s == pytest.approx(1_010_000 / 20_000)


@pytest.mark.asyncio
async def test_a_tenant_goes_to_the_worker_where_it_has_little_waiting(stage: Any) -> None:
    full(stage, "a", "b")
    stage.fleet.peers.take([{"a": sent(heavy=1000, light=4000), "b": sent(heavy=6000)}])
    for _ in range(3):
        assert stage.reserve(owner=LIGHT, weight=1).worker == "b"
        assert stage.reserve(owner=HEAVY, weight=4).worker == "a"


@pytest.mark.asyncio
async def test_the_routers_own_requests_count_until_they_begin(stage: Any) -> None:
    stage.add("a", "b")
    stage.reserve(owner=HEAVY, weight=4, only=WorkerId("a"), num_tokens=4000)
    light = [stage.reserve(owner=LIGHT, weight=1, only=WorkerId("a"), num_tokens=1000) for _ in range(4)]
    stage.reserve(owner=HEAVY, weight=4, only=WorkerId("b"), num_tokens=8100)

    def waiting() -> dict[bytes, int]:
        return {owner: tokens for owner, _, tokens in stage.fleet.sent()["a"].line}

    assert waiting() == {owner_of(HEAVY): 4016, owner_of(LIGHT): 4 * 1016}
    assert stage.fleet.explain(stage.ask(owner=LIGHT)).worker == "b"
    light[0].started()
    assert waiting()[owner_of(LIGHT)] == 3 * 1016
    for one in light:
        one.release()
    assert list(waiting()) == [owner_of(HEAVY)]


@pytest.mark.asyncio
async def test_a_flood_of_one_tenant_does_not_refuse_another_for_its_time(stage: Any) -> None:
    full(stage, "a")
    stage.fleet.peers.take([{"a": sent(heavy=1_000_000)}])
    prompt = Prompt(100, 16, b"key", ttft_s=1.0)
    assert stage.fleet.explain(replace(stage.ask(owner=LIGHT), prompt=prompt)).worker == "a"
    assert stage.fleet.explain(replace(stage.ask(owner=HEAVY, weight=4), prompt=prompt)).reason == TOO_SLOW


@pytest.mark.asyncio
async def test_other_routers_are_not_told_the_root_of_a_scope(stage: Any) -> None:
    stage.add("a")
    stage.reserve(owner=LIGHT)
    assert LIGHT not in msgspec.msgpack.encode(stage.fleet.sent())


def test_what_others_say_adds_up_by_owner() -> None:
    peers = PeerLoads()
    peers.take([{"w": sent(heavy=10, light=5)}, {"w": sent(light=7)}])
    assert peers.at(WorkerId("w"), 1).line == {owner_of(HEAVY): (4, 10), owner_of(LIGHT): (1, 12)}
    assert list(peers.news()) == [("w", 1)]
    peers.take([{"w": sent(heavy=17, light=5)}, {"w": sent(heavy=0, light=0)}])
    assert list(peers.news()) == [("w", 1)]


@pytest.mark.asyncio
async def test_backlogs_of_two_tenants_stay_at_both_workers(stage: Any) -> None:
    """Whoever is answered asks again; the workers serve by weight, several at a step, who has anything there."""
    stage.add("a", "b", max_sequences=4, max_waiting=4096)
    rng = random.Random(1)
    waiting: dict[str, dict[ScopeRoot, list[Reservation]]] = {w: {HEAVY: [], LIGHT: []} for w in ("a", "b")}
    service: dict[str, Counter[ScopeRoot]] = {"a": Counter(), "b": Counter()}

    def ask(owner: ScopeRoot) -> None:
        held = stage.reserve(owner=owner, weight=WEIGHTS[owner], num_tokens=64)
        waiting[held.worker][owner].append(held)

    for owner in (HEAVY, LIGHT) * 24:
        ask(owner)
    empty = 0
    for _ in range(400):
        stage.now += 0.5
        again = []
        for worker, there in waiting.items():
            for _ in range(4):
                owner = min((one for one in there if there[one]), key=lambda one: service[worker][one] / WEIGHTS[one])
                service[worker][owner] += 1
                there[owner].pop(0).release()
                again.append(owner)
            empty += sum(not one for one in there.values())
        rng.shuffle(again)
        for owner in again:
            ask(owner)
    assert empty == 0
