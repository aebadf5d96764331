"""Each term of the cost, each plan, and what they make placement do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.block import WorkerId
from router.cost import BEHIND
from router.placement import TOO_SLOW, Candidate, Placement, Prompt, Pull, PullRates, Terms, place

RATE = 10_000.0
PROMPT = Prompt(4000, 64, b"key")


def candidate(name: str = "a", **fields: object) -> Candidate:
    return replace(Candidate(WorkerId(name), 0, 0, RATE, 0.0, 0.0), **fields)  # type: ignore[arg-type]


def terms(*candidates: Candidate, **more: PullRates | float) -> dict[str, Terms]:
    placement = place(PROMPT, candidates, **more)  # type: ignore[arg-type]
    return {row.worker: row for row in placement.terms}


def test_running_decodes_are_slowed_by_what_is_computed() -> None:
    row = terms(candidate(running=5, cached_tokens=3000))["a"]
    assert row.decode_s == pytest.approx(5 * 0.1)
    assert row.total_s == pytest.approx(row.ttft_s + row.decode_s)


def test_those_behind_wait_for_what_is_computed_as_long_as_the_worker_stays_busy() -> None:
    row = terms(candidate(queued_tokens=5000, arrivals_per_s=0.5, utilization=0.75))["a"]
    assert row.behind_s == pytest.approx(BEHIND * 0.4 * (0.5 + 0.4) * 0.5 / 0.25)
    assert terms(candidate(queued_tokens=5000, utilization=0.75))["a"].behind_s == 0


def test_eviction_costs_what_will_be_asked_for_again_and_does_not_fit() -> None:
    assert terms(candidate(free_tokens=1000, reuse=0.5))["a"].eviction_s == pytest.approx(3000 / RATE * 0.5)
    assert terms(candidate(free_tokens=4000, reuse=0.5))["a"].eviction_s == 0
    assert terms(candidate(cached_tokens=3200, reuse=1.0))["a"].eviction_s == pytest.approx(800 / RATE)


def test_a_new_session_goes_where_it_evicts_what_nobody_will_miss() -> None:
    full = candidate("full", reuse=0.9, cached_tokens=16)
    assert place(PROMPT, [full, candidate("stale", reuse=0.1)]).worker == "stale"


def test_what_another_computes_there_is_waited_for_when_nothing_is_cheaper() -> None:
    row = terms(candidate(queued_tokens=4000, computing_tokens=3200))["a"]
    assert (row.plan, row.cached_tokens, row.uncached_tokens) == ("wait", 3200, 800)
    assert row.ttft_s == pytest.approx((4000 + 800) / RATE)


def test_blocks_on_the_cpu_are_loaded_where_that_is_faster_than_computing() -> None:
    row = terms(candidate(cached_tokens=1600, tier_tokens=3200, load_share=0.25))["a"]
    assert (row.plan, row.cached_tokens) == ("load", 3200)
    assert row.plan_s == pytest.approx((0.25 * 1600 + 800) / RATE)
    slow = terms(candidate(cached_tokens=1600, tier_tokens=3200, load_share=1.5))["a"]
    assert (slow.plan, slow.cached_tokens) == ("recompute", 1600)


def test_blocks_of_a_peer_are_pulled_only_where_the_fleet_can_and_it_pays() -> None:
    far = candidate("far", cached_tokens=3200, queued_tokens=50_000, payload_format="x", load_share=0.0)
    near = candidate("near", payload_format="x", load_share=0.0)
    assert terms(far, near)["near"].plan == "recompute"
    rates = PullRates(start_s=0.01, s_per_token=1e-5)
    row = terms(far, near, pull=rates)["near"]
    assert (row.plan, row.cached_tokens) == ("pull", 3200)
    assert row.plan_s == pytest.approx(0.01 + 3200e-5 + 800 / RATE)
    assert row.pull == Pull(WorkerId("far"), 3200, pytest.approx(0.01 + 3200e-5), 0.0, pytest.approx(0.32))
    busy = terms(replace(far, pulls=2), near, pull=rates)["near"]
    assert busy.plan_s == pytest.approx(0.01 + 3 * 3200e-5 + 800 / RATE)
    dear = terms(replace(far, pulls=20), near, pull=rates)["near"]
    assert (dear.plan, dear.pull, dear.cached_tokens) == ("recompute", None, 0)
    assert terms(far, near, pull=rates)["far"].plan == "recompute"
    loads = terms(far, replace(near, load_share=0.2), pull=rates)["near"]
    assert loads.plan_s == pytest.approx(0.01 + 3200e-5 + 0.2 * 3200 / RATE + 800 / RATE)


@pytest.mark.parametrize(("source", "target"), [("x", "y"), ("x", ""), ("", "x"), ("", "")])
def test_workers_of_different_formats_never_pull(source: str, target: str) -> None:
    far = candidate("far", cached_tokens=3200, queued_tokens=50_000, payload_format=source)
    near, third = candidate("near", payload_format=target), candidate("third", payload_format="z")
    free = PullRates(0.0, 0.0)
    assert {row.plan for row in terms(far, near, third, pull=free).values()} == {"recompute"}
    same = replace(near, payload_format="x"), replace(far, payload_format="x")
    assert terms(*same, third, pull=free)["near"].plan == "pull"


def test_a_pull_is_from_the_one_whose_blocks_save_most_on_either_tier() -> None:
    long = candidate("long", cached_tokens=1600, tier_tokens=3200, payload_format="x")
    short = candidate("short", cached_tokens=2400, payload_format="x")
    near = candidate("near", payload_format="x", cached_tokens=160, tier_tokens=800, load_share=0.1)
    rates = PullRates(0.001, 2e-5)

    def pull(*sources: Candidate) -> tuple[str, int]:
        row = terms(*sources, near, pull=rates)["near"]
        assert row.plan == "pull" and row.pull is not None
        return row.pull.source, row.pull.num_tokens

    assert pull(long, short) == ("long", 3200)
    assert pull(replace(long, pulls=3), short) == ("short", 2400)
    assert pull(replace(long, pull_share=0.5), short) == ("short", 2400)
    row = terms(long, near, pull=rates)["near"]
    # What it has on its own CPU is not fetched; all that is not on the device is loaded.
    assert row.plan_s == pytest.approx(0.001 + 2400 * 2e-5 + 0.1 * 3040 / RATE + 800 / RATE)
    doubted = terms(replace(long, pull_share=0.5), near, pull=rates)["near"]
    assert doubted.expected_cached == 800 + 0.5 * 2400


def test_a_worker_that_did_not_have_what_was_predicted_is_believed_less() -> None:
    row = terms(candidate(cached_tokens=3200, confidence=0.5))["a"]
    assert (row.cached_tokens, row.expected_cached, row.uncached_tokens) == (3200, 1600, 2400)
    assert row.plan_s == pytest.approx(2400 / RATE)
    honest = candidate("honest", cached_tokens=2000)
    assert place(PROMPT, [candidate("liar", cached_tokens=3200, confidence=0.5), honest]).worker == "honest"


def test_prompts_of_a_length_that_computes_slower_cost_more() -> None:
    assert terms(candidate(), length_factor=1.5)["a"].plan_s == pytest.approx(1.5 * 4000 / RATE)


def in_time(ttft_s: float, *candidates: Candidate) -> Placement:
    return place(replace(PROMPT, ttft_s=ttft_s), candidates)


def test_a_tenants_time_to_first_token_keeps_out_who_would_be_later() -> None:
    crowded = candidate("crowded", cached_tokens=3984, queued_tokens=5000)
    idle = candidate("idle", running=9)
    assert in_time(0, crowded, idle).worker == "crowded"
    assert in_time(0.45, crowded, idle).worker == "idle"
    refused = in_time(0.45, crowded, replace(idle, queued_tokens=1000))
    assert refused.worker is None and refused.reason == TOO_SLOW
    assert refused.retry_after_s == pytest.approx(0.05)
    assert {row.worker for row in refused.terms} == {"crowded", "idle"}


def test_a_time_that_an_idle_fleet_could_not_meet_keeps_nobody_out() -> None:
    assert in_time(0.1, candidate("a", queued_tokens=100), candidate("b")).worker == "b"


def test_ties_pass_over_who_was_busy_of_late() -> None:
    workers = [candidate(f"w{i}", utilization=0.1) for i in range(4)]
    home = place(PROMPT, workers).worker
    busier = [replace(c, utilization=0.3) if c.worker == home else c for c in workers]
    other = place(PROMPT, busier).worker
    assert other != home
    assert place(PROMPT, busier[::-1]).worker == other
