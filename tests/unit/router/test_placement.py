"""Placement: pure costs in seconds, ties without talking, and the traps that collapse a fleet."""

from __future__ import annotations

from collections import Counter
from dataclasses import FrozenInstanceError, replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import WorkerId
from router.placement import TIE_FRACTION, TIE_S, Candidate, Prompt, place
from router.unheard import Others

RATE = 20_000.0


def candidate(name: str, **fields: object) -> Candidate:
    idle = Candidate(
        worker=WorkerId(name),
        cached_tokens=0,
        queued_tokens=0,
        prefill_tokens_per_s=RATE,
        step_s=0.0,
        slot_wait_s=0.0,
    )
    return replace(idle, **fields)  # type: ignore[arg-type]


def prompt(num_tokens: int = 1024, tie_key: bytes = b"key") -> Prompt:
    return Prompt(num_tokens, 64, tie_key)


def test_every_term_is_seconds_at_the_workers_own_rate() -> None:
    fast = candidate("fast", queued_tokens=4000, prefill_tokens_per_s=20_000.0, cached_tokens=512, step_s=0.004)
    slow = candidate("slow", cached_tokens=0, prefill_tokens_per_s=2_000.0, slot_wait_s=0.25)
    placement = place(prompt(1024), [fast, slow])
    by_name = {terms.worker: terms for terms in placement.terms}
    assert by_name[WorkerId("fast")].queue_s == pytest.approx(0.2)
    assert by_name[WorkerId("fast")].step_s == pytest.approx(0.004)
    assert by_name[WorkerId("fast")].plan_s == pytest.approx(512 / 20_000)
    assert by_name[WorkerId("slow")].slot_s == pytest.approx(0.25)
    assert by_name[WorkerId("slow")].plan_s == pytest.approx(1024 / 2_000)
    assert by_name[WorkerId("slow")].ttft_s == by_name[WorkerId("slow")].total_s == pytest.approx(0.25 + 1024 / 2_000)
    assert placement.worker == "fast"
    assert placement.predicted_cached == 512 and placement.uncached_tokens == 512
    assert placement.reason == "least cost"


def test_cached_prefix_wins_until_its_queue_costs_more_than_computing_again() -> None:
    def choice(queued: int) -> str | None:
        warm = candidate("warm", cached_tokens=1008, queued_tokens=queued)
        return place(prompt(1024), [warm, candidate("cold")]).worker

    assert choice(0) == choice(900) == "warm"
    assert choice(1100) == "cold"


def test_excluded_workers_are_named_with_their_reason_and_never_chosen() -> None:
    draining = candidate("a", cached_tokens=1008, excluded="draining")
    placement = place(prompt(), [draining, candidate("b", queued_tokens=10**6)])
    assert placement.worker == "b"
    assert placement.excluded == (("a", "draining"),)
    none = place(prompt(), [draining])
    assert none.worker is None and none.terms == () and none.excluded == (("a", "draining"),)
    assert place(prompt(), []).worker is None


def test_near_tie_goes_to_the_most_cached_then_to_the_same_rendezvous_in_every_router() -> None:
    workers = [candidate(f"w{i}") for i in range(6)]
    keys = [bytes([i]) * 16 for i in range(200)]
    chosen = {key: place(prompt(tie_key=key), workers).worker for key in keys}
    for order in list(permutations(workers))[::97]:
        assert all(place(prompt(tie_key=key), order).worker == chosen[key] for key in keys[:10])
    spread = Counter(chosen.values())
    assert len(spread) == 6 and max(spread.values()) < 3 * 200 / 6
    warm = replace(workers[3], cached_tokens=16)  # 0.8 ms better: inside the tie, yet less to compute
    assert place(prompt(), [*workers[:3], warm, *workers[4:]]).worker == "w3"


def test_a_lost_worker_moves_only_its_own_ties() -> None:
    workers = [candidate(f"w{i}") for i in range(5)]
    for i in range(100):
        before = place(prompt(tie_key=bytes([i])), workers).worker
        after = place(prompt(tie_key=bytes([i])), workers[:-1]).worker
        assert before == after or before == "w4"


def test_round_robin_takes_turns_among_those_that_can() -> None:
    workers = [candidate("b"), candidate("a", cached_tokens=1008), candidate("c", excluded="draining")]
    turns = [place(prompt(), workers, "round_robin", turn).worker for turn in range(4)]
    assert turns == ["a", "b", "a", "b"]
    assert place(prompt(), workers, "round_robin", 0).predicted_cached == 1008


def test_unmeasured_rate_is_taken_from_the_peers() -> None:
    new = candidate("new", prefill_tokens_per_s=0.0)
    busy = candidate("busy", queued_tokens=2000)
    assert place(prompt(), [new, busy]).worker == "new"
    terms = {t.worker: t for t in place(prompt(), [new, busy]).terms}
    assert terms[WorkerId("new")].plan_s == terms[WorkerId("busy")].plan_s
    assert place(prompt(), [new]).worker == "new"


def test_noise_in_measured_rates_does_not_decide_but_a_slower_device_does() -> None:
    near = [candidate(f"w{i}", prefill_tokens_per_s=RATE * (0.9 + 0.05 * i)) for i in range(4)]
    chosen = {place(prompt(tie_key=bytes([i])), near).worker for i in range(50)}
    assert len(chosen) == 4
    slow = candidate("slow", prefill_tokens_per_s=RATE / 4)
    assert all(place(prompt(tie_key=bytes([i])), [*near, slow]).worker != "slow" for i in range(50))


candidates = st.lists(
    st.builds(
        Candidate,
        worker=st.integers(0, 99).map(lambda n: WorkerId(f"w{n}")),
        cached_tokens=st.integers(0, 63).map(lambda blocks: blocks * 16),
        queued_tokens=st.integers(0, 50_000),
        prefill_tokens_per_s=st.sampled_from([0.0, 800.0, 20_000.0]),
        step_s=st.floats(0, 0.2),
        slot_wait_s=st.floats(0, 2),
        excluded=st.sampled_from(["", "", "draining"]),
    ),
    max_size=12,
    unique_by=lambda c: c.worker,
)


@given(candidates, st.binary(min_size=1, max_size=16))
def test_the_choice_is_eligible_near_the_least_and_independent_of_order(workers: list[Candidate], key: bytes) -> None:
    placement = place(prompt(1024, key), workers)
    assert placement == place(prompt(1024, key), workers)
    eligible = {c.worker for c in workers if not c.excluded}
    assert {t.worker for t in placement.terms} == eligible
    assert len(placement.terms) + len(placement.excluded) == len(workers)
    assert place(prompt(1024, key), workers[::-1]).worker == placement.worker
    if not eligible:
        assert placement.worker is None
        return
    totals = {t.worker: t.total_s for t in placement.terms}
    least = min(totals.values())
    assert placement.worker is not None
    assert totals[placement.worker] <= max(least * (1 + TIE_FRACTION), least + TIE_S)


def test_decisions_are_frozen() -> None:
    placement = place(prompt(), [candidate("a")])
    with pytest.raises(FrozenInstanceError):
        placement.worker = None  # type: ignore[misc]


def test_a_head_that_all_requests_share_does_not_draw_all_of_them_to_one_worker() -> None:
    """One lane of prefill for each worker, arrivals at 90 % of what the fleet can do with the head cached."""
    head, tail, num_workers = 2000, 400, 4
    free_at = [0.0] * num_workers
    warm = [False] * num_workers
    work = Counter[int]()
    gap = tail / RATE / num_workers / 0.9
    for number in range(2000):
        now = number * gap
        workers = [
            candidate(
                str(w), cached_tokens=head if warm[w] else 0, queued_tokens=int(max(0.0, free_at[w] - now) * RATE)
            )
            for w in range(num_workers)
        ]
        placement = place(prompt(head + tail, b"head"), workers)
        assert placement.worker is not None
        chosen = int(placement.worker)
        free_at[chosen] = max(free_at[chosen], now) + placement.uncached_tokens / RATE
        warm[chosen] = True
        work[chosen] += 1
    assert len(work) == num_workers
    assert max(work.values()) <= 1.3 * 2000 / num_workers


# What other routers place at the same moment


def test_cold_prompts_of_one_moment_do_not_follow_each_other() -> None:
    """Sent by routers that see the same least cost and do not talk; each worker gets what brings all to one level."""
    workers = [candidate(f"w{n}", queued_tokens=1000 * n, utilization=n / 100) for n in range(5)]
    keys = [str(number).encode() for number in range(10)]
    alone = Counter(place(prompt(tie_key=key), workers).worker for key in keys)
    together = Counter(
        place(prompt(tie_key=key), workers, others=Others(10_000, rank, 10)).worker for rank, key in enumerate(keys)
    )
    assert alone == {"w0": 10}
    assert together == {"w0": 4, "w1": 3, "w2": 2, "w3": 1}


def test_who_has_a_prompt_gets_it_though_much_is_placed_at_the_same_moment() -> None:
    workers = [candidate(f"w{n}", cached_tokens=16 + 960 * (n == 2), confidence=0.9 + n / 50) for n in range(4)]
    for number in range(50):
        chosen = place(prompt(tie_key=str(number).encode()), workers, others=Others(20_000, 0, 2))
        assert chosen.worker == "w2"
    late = [replace(one, queued_tokens=40_000 * (one.worker == "w2")) for one in workers]
    chosen = place(prompt(), late, others=Others(20_000, 0, 2))
    assert chosen.worker != "w2" and chosen.terms[0].queue_s == pytest.approx(20_000 / 3 / RATE)


def test_nothing_is_expected_where_nothing_can_go() -> None:
    workers = [candidate("idle", excluded="draining"), candidate("a"), candidate("b", queued_tokens=500)]
    placement = place(prompt(), workers, others=Others(300, 1, 2))
    assert placement.worker == "a"
    assert {terms.worker: terms.queue_s for terms in placement.terms} == pytest.approx(
        {"a": 300 / RATE, "b": 500 / RATE}
    )
