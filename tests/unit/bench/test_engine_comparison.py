"""Rounds of a comparison: who is first, what a failure leaves, what is kept of a run that is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bench.engine.comparison import WARM_UP, Contest, Contestant, Results, run_contest
from bench.engine.drive import Figures
from bench.engine.machine import Machine
from bench.engine.scenario import MultiTenant

SCENARIO = MultiTenant(tenants=2, system_tokens=8, requests=6, unique_tokens=3, output_tokens=4, concurrency=2)
MACHINE = Machine("one", 2, "2", "float32", read_gb_s=10.0, matmul_gflop_s=100.0, load_average=0.0)


class Recorder:
    """Contestants that write down when they were asked."""

    def __init__(self, failing: dict[str, int] | None = None) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.seen: list[Results] = []
        self._failing = failing or {}

    def contestant(self, name: str) -> Contestant:
        async def measure(scenario: MultiTenant, number: int, into: Figures) -> None:
            self.asked.append((name, number, scenario.requests))
            into["decode_tokens_per_s"] = float(number)
            if self._failing.get(name) == number:
                raise ValueError("no more")
            into["prefill_tokens_per_s"] = 1.0

        return Contestant(name, measure)

    def run(self, names: Sequence[str], rounds: int) -> Results:
        contest = Contest(SCENARIO, 100, rounds, lambda: MACHINE, lambda line: None, self.seen.append)
        return asyncio.run(run_contest(contest, [self.contestant(name) for name in names], [], {"d": "not asked for"}))


def test_each_is_first_in_turn_after_a_small_round_that_is_not_kept() -> None:
    recorder = Recorder()
    results = recorder.run("abc", 4)
    assert [each.order for each in results.rounds] == [tuple("abc"), tuple("bca"), tuple("cab"), tuple("abc")]
    assert recorder.asked[:3] == [(name, WARM_UP, SCENARIO.tenants) for name in "abc"]
    assert all(requests == SCENARIO.requests for _, _, requests in recorder.asked[3:])
    assert results.names == ("a", "b", "c") and results.absent == {"d": "not asked for"}


def test_what_was_measured_is_there_after_every_round() -> None:
    recorder = Recorder()
    results = recorder.run("ab", 2)
    assert [len(seen.rounds) for seen in recorder.seen] == [1, 2]
    assert recorder.seen[-1] == results and all(each.machine == MACHINE for each in results.rounds)


def test_one_that_fails_keeps_what_it_has_and_is_not_asked_again() -> None:
    recorder = Recorder({"b": 1})
    results = recorder.run("ab", 3)
    ones = [each.figures["b"] for each in results.rounds]
    assert ones[1]["decode_tokens_per_s"] == 1.0 and "prefill_tokens_per_s" not in ones[1] and ones[2] == {}
    assert results.failures == {"b": "ValueError: no more"}
    assert [number for name, number, _ in recorder.asked if name == "b"] == [WARM_UP, 0, 1]
    assert all(each.figures["a"]["prefill_tokens_per_s"] == 1.0 for each in results.rounds)
