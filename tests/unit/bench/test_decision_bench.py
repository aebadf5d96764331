"""The benchmark of decisions: it measures what it says, on small fleets."""

from __future__ import annotations

from array import array

from bench.decision import PROMPT_TOKENS, measure
from bench.decision_peers import measured


def test_all_parts_are_measured_and_the_whole_is_more_than_its_decision() -> None:
    figures = measure(4, 500, 60)
    assert figures.workers == 4 and figures.blocks >= 500
    assert 0 < figures.key.p50 < figures.decision.p50 <= figures.decision.p99
    assert 0 < figures.match.p50 < figures.decision.p50
    assert figures.decisions_per_s > 0


def test_peers_that_are_not_installed_are_left_out() -> None:
    found = measured([array("I", range(PROMPT_TOKENS))], 16, 3)
    assert all(len(times) == 3 for times in found.values())
