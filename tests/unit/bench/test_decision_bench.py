"""The benchmark of decisions: it measures what it says, on small fleets."""

from __future__ import annotations

from array import array

from bench.decision import PROMPT_TOKENS, measure
from bench.decision_peers import measured


def test_all_parts_are_measured() -> None:
    figures = measure(4, 500, 60)
    assert figures.workers == 4 and figures.blocks >= 500
    for part in (figures.key, figures.match, figures.decision):
        assert 0 < part.p50 <= part.p99
    assert figures.decisions_per_s > 0


def test_peers_that_are_not_installed_are_left_out() -> None:
    found = measured([array("I", range(PROMPT_TOKENS))], 16, 3)
    assert all(len(times) == 3 for times in found.values())
