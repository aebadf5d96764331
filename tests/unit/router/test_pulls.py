"""Pulls in a fleet: chosen when cheaper, counted and released, sent with a deadline, measured, and repaired."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from kvstore.block import BlockKey, WorkerId
from kvstore.events import CPU, BlocksStored
from kvstore.scope import ScopeRoot
from router.link_messages import AdmissionReport, PullOrder, Purged, SamplingChoice, Submission, submit_message
from router.placement import Candidate, Pull
from router.pulls import (
    FIRST_SHARE,
    FIRST_START_S,
    LEAST_TIMEOUT_S,
    MOST_TIMEOUT_S,
    TIMEOUT_FACTOR,
    Giver,
    PullMeter,
    timeout_s,
)
from tests.unit.router.conftest import BLOCK, Stage

Keys = Callable[[str, int], list[BlockKey]]
BLOCKS = 400
TOKENS = BLOCKS * BLOCK + 1
ALL = BLOCKS * BLOCK


def busy_holder(stage: Stage, keys: list[BlockKey], *, formats: tuple[str, str] = ("x", "x"), tier: int = 0) -> None:
    """`a` has the prompt and much to do, `b` is idle."""
    stage.add("a", payload_format=formats[0])
    stage.add("b", payload_format=formats[1])
    stage.index.apply(WorkerId("a"), 1, [BlocksStored(list(keys), tier)])
    stage.link("a").say_load(running=1, queued_tokens=100_000, free_blocks=1000, prefill_tokens_per_s=20_000.0)
    stage.link("b").say_load(free_blocks=1000, prefill_tokens_per_s=20_000.0)


def candidate(stage: Stage, name: str) -> Candidate:
    asked = stage.ask([BlockKey(b"another")], num_tokens=BLOCK + 1)
    return next(c for c in stage.fleet.candidates(asked) if c.worker == name)


def came(**fields: Any) -> AdmissionReport:
    return AdmissionReport(**{"cached_remote": ALL, "pulled_tokens": ALL, "pull_s": 0.1} | fields)


@pytest.mark.asyncio
@pytest.mark.parametrize("tier", [0, CPU])
async def test_a_busy_holder_gives_to_an_idle_worker(stage: Stage, some_keys: Keys, tier: int) -> None:
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys, tier=tier)
    held = stage.reserve(keys, num_tokens=TOKENS)
    placement = held.placement
    assert held.worker == "b" and placement.chosen.plan == "pull" and placement.pull is not None
    assert (placement.pull.source, placement.predicted_cached, placement.uncached_tokens) == ("a", ALL, 1)
    seconds = FIRST_START_S + ALL * FIRST_SHARE / 20_000
    assert placement.pull.seconds == pytest.approx(seconds)
    assert held.pull == PullOrder("a:1", 1, BLOCKS, pytest.approx(ALL / 20_000))
    held.release()


@pytest.mark.asyncio
@pytest.mark.parametrize("formats", [("x", "y"), ("x", ""), ("", "x"), ("", "")])
async def test_without_a_common_format_it_is_computed(stage: Stage, some_keys: Keys, formats: tuple[str, str]) -> None:
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys, formats=formats)
    held = stage.reserve(keys, num_tokens=TOKENS)
    assert (held.worker, held.placement.chosen.plan, held.pull) == ("b", "recompute", None)
    assert held.placement.predicted_cached == 0
    held.release()


@pytest.mark.asyncio
async def test_a_pull_that_costs_more_than_it_saves_is_not_made(stage: Stage, some_keys: Keys) -> None:
    keys = some_keys("x", 20)
    busy_holder(stage, keys)
    dear = stage.reserve(keys, num_tokens=321)
    assert (dear.worker, dear.placement.chosen.plan, dear.pull) == ("b", "recompute", None)
    dear.release()
    for _ in range(20):
        stage.fleet._board.pulls.add(3200, 0.002, stage.now)
    stage.now += 1.0  # what was computed is credited no more
    cheap = stage.reserve(keys, num_tokens=321)
    assert (cheap.worker, cheap.placement.chosen.plan) == ("b", "pull")
    cheap.release()


@pytest.mark.asyncio
async def test_a_worker_that_cannot_be_reached_is_no_source(stage: Stage, some_keys: Keys) -> None:
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys)
    stage.link("a").break_off()
    held = stage.reserve(keys, num_tokens=TOKENS)
    assert (held.worker, held.placement.chosen.plan) == ("b", "recompute")
    held.release()


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["answered", "no admission", "released at once", "released twice", "source is new"])
async def test_pulls_under_way_are_counted_until_they_end(stage: Stage, some_keys: Keys, way: str) -> None:
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys)
    stage.add("c", payload_format="x")
    first, second = (stage.reserve(keys, num_tokens=TOKENS) for _ in range(2))
    pulled = [held for held in (first, second) if held.pull is not None]
    assert pulled and candidate(stage, "a").pulls == len(pulled)
    if len(pulled) == 2:
        assert second.placement.pull.seconds > first.placement.pull.seconds
    match way:
        case "answered":
            first.started(came())
            first.started(came())
            second.started(came())
        case "no admission":
            first.started()
            second.started()
        case "released twice":
            first.release()
        case "source is new":
            stage.mirror.say(stage.lease("a", epoch=2, payload_format="x"))
            stage.link("a").come_up()
    if way in ("answered", "no admission"):
        assert candidate(stage, "a").pulls == 0
    for held in (first, second, first):
        held.release()
    assert candidate(stage, "a").pulls == 0


@pytest.mark.asyncio
async def test_who_lacks_what_was_predicted_is_struck_and_asked_less(stage: Stage, some_keys: Keys) -> None:
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys)
    held = stage.reserve(keys, num_tokens=TOKENS)
    held.started(AdmissionReport(pull_s=0.002, peer_lacks=True))
    assert "a" not in stage.index.match(keys)
    assert candidate(stage, "a").pull_share < 1
    # Neither the worker that asked nor the speed of blocks is thought less of.
    assert candidate(stage, "b").confidence == 1.0
    assert stage.fleet._board.pull_rates(stage.now).start_s == pytest.approx(FIRST_START_S)
    held.release()


@pytest.mark.asyncio
async def test_what_did_not_come_in_time_is_not_struck(stage: Stage, some_keys: Keys) -> None:
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys)
    before = stage.fleet._board.pull_rates(stage.now)
    held = stage.reserve(keys, num_tokens=TOKENS)
    held.started(came(cached_remote=0, pulled_tokens=0, pull_s=held.pull.timeout_s))
    assert stage.index.match(keys)["a"].num_blocks == BLOCKS
    assert candidate(stage, "a").pull_share == pytest.approx(0.7)
    assert stage.fleet._board.pull_rates(stage.now).start_s > before.start_s
    held.release()
    stage.now += 6 * 3600.0
    stage.link("a").say_load(queued_tokens=100_000, prefill_tokens_per_s=20_000.0)
    assert candidate(stage, "a").pull_share == pytest.approx(1.0)
    assert stage.fleet._board.pull_rates(stage.now).start_s == pytest.approx(FIRST_START_S)


@pytest.mark.asyncio
async def test_another_life_of_the_source_keeps_its_blocks(stage: Stage, some_keys: Keys) -> None:
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys)
    held = stage.reserve(keys, num_tokens=TOKENS)
    stage.mirror.say(stage.lease("a", epoch=2, payload_format="x"))
    stage.link("a").come_up()
    stage.store("a", keys, epoch=2)
    held.started(AdmissionReport(pull_s=0.002, peer_lacks=True))
    assert stage.index.match(keys)["a"].num_blocks == BLOCKS
    held.release()


@pytest.mark.asyncio
async def test_pulls_are_measured_as_they_come(stage: Stage, some_keys: Keys) -> None:
    """After some pulls of 40 us a token the next one is predicted so; what came from nobody's pull says nothing."""
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys)
    for number in range(30):
        held = stage.reserve(keys, num_tokens=TOKENS)
        assert held.placement.pull is not None, number
        held.started(came(pull_s=0.005 + ALL * 1e-5))
        held.release()
        stage.now += 1.0
    predicted = held.placement.pull.seconds
    assert predicted == pytest.approx(0.005 + ALL * 1e-5, rel=0.1)
    held = stage.reserve(keys, num_tokens=TOKENS)
    held.started(came(pulled_tokens=0, pull_s=0.0))
    assert candidate(stage, "a").pull_share == 1.0
    held.release()


def test_a_line_is_found_whatever_pulls_there_are() -> None:
    rng = random.Random(1)
    for start_s, token_s in ((0.002, 1e-6), (0.05, 3e-5), (0.0, 1e-4)):
        meter, now = PullMeter(), 0.0
        for _ in range(60):
            tokens = rng.choice((256.0, 2048.0, 16_000.0))
            now += 1.0
            meter.add(tokens, (start_s + tokens * token_s) * rng.uniform(0.95, 1.05), now)
        rates = meter.rates(1e-4, now)
        for tokens in (500, 4000, 16_000):
            expected = start_s + tokens * token_s
            assert rates.start_s + tokens * rates.s_per_token == pytest.approx(expected, rel=0.25)
        assert rates.start_s >= 0 and rates.s_per_token >= 0


@pytest.mark.parametrize("samples", [[(0.0, 5.0)] * 5, [(4000.0, 0.0)] * 5, [(100.0, 9.0), (8000.0, 1.0)] * 9])
def test_odd_measurements_give_no_negative_rate(samples: list[tuple[float, float]]) -> None:
    meter = PullMeter()
    for tokens, seconds in samples:
        meter.add(tokens, seconds, 1.0)
    rates = meter.rates(1e-4, 1.0)
    assert rates.start_s >= 0 and rates.s_per_token >= 0


def test_a_deadline_is_some_times_what_it_should_take_or_what_computing_takes() -> None:
    def of(seconds: float, compute_s: float) -> float:
        return timeout_s(Pull(WorkerId("a"), 16, seconds, 0.0, compute_s))

    assert of(0.0, 100.0) == of(0.1, 0.0) == LEAST_TIMEOUT_S and of(1e9, 1e9) == MOST_TIMEOUT_S
    assert of(1.0, 9.0) == TIMEOUT_FACTOR
    assert of(1.0, 1.5) == 1.5


def test_a_giver_is_believed_again_in_time() -> None:
    giver = Giver()
    assert giver.share(5.0) == 1.0
    for _ in range(30):
        giver.gave(0.0, 5.0)
    assert giver.share(5.0) < 0.01
    assert giver.share(605.0) > 0.99
    giver.gave(0.5, 605.0)
    assert giver.share(605.0) == pytest.approx(0.85, abs=0.01)


@pytest.mark.asyncio
async def test_siblings_of_a_pulled_prompt_do_not_wait_for_what_nobody_computes(stage: Stage, some_keys: Keys) -> None:
    keys = some_keys("x", BLOCKS)
    busy_holder(stage, keys)
    first = stage.reserve(keys, num_tokens=TOKENS)
    assert first.placement.chosen.plan == "pull"
    again = next(t for t in stage.fleet.explain(stage.ask(keys, num_tokens=TOKENS)).terms if t.worker == "b")
    assert again.plan != "wait"
    first.release()


@pytest.mark.parametrize(("left_s", "timeout_ms"), [(60.0, 1500), (1.0, 500), (0.0, 1)])
def test_an_order_goes_with_the_request_and_leaves_it_time(left_s: float, timeout_ms: int) -> None:
    order = PullOrder("a:1", 3, 25, 1.5)
    submission = Submission(
        "r", 1, array("I", [1, 2]), 2, (), (), SamplingChoice(), 0, timeout_s=left_s, no_store=False, pull=order
    )
    pull = submit_message([1], submission).pull
    assert (pull.address, pull.epoch, pull.num_blocks, pull.timeout_ms) == ("a:1", 3, 25, timeout_ms)
    assert not submit_message([1], replace(submission, pull=None)).HasField("pull")


def test_a_lease_of_before_says_that_it_gives_nothing() -> None:
    lease = Stage.lease(Stage.__new__(Stage), "w")
    document = msgspec.json.decode(msgspec.json.encode(lease))
    del document["payload_format"]
    assert msgspec.convert(document, type(lease)).payload_format == ""


@pytest.mark.asyncio
@pytest.mark.parametrize(("formats", "times"), [(("x", "x"), 2), (("x", "y"), 1)])
async def test_a_purge_asks_again_for_what_was_on_its_way(stage: Stage, formats: tuple[str, str], times: int) -> None:
    asked: list[str] = []
    for name, payload_format in zip("ab", formats, strict=True):
        stage.add(name, payload_format=payload_format)

        async def purge(roots: object, timeout_s: float, name: str = name) -> Purged:
            asked.append(name)
            return Purged(3, 2, 4 - len(asked))

        stage.link(name).purge = purge  # type: ignore[method-assign, assignment]
    answers = await stage.fleet.purge([ScopeRoot(b"r" * 16)], 1.0)
    assert sorted(asked) == sorted("ab" * times)
    assert asked[:2] == ["a", "b"]
    assert answers["a"] == (Purged(6, 4, 1) if times == 2 else Purged(3, 2, 3))
