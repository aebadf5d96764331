"""The bench of pulls: what it calls best is best, a wrong choice would show, and its command says what was missed."""

from __future__ import annotations

import json
import random

import pytest

from bench import pull, pull_choice, pull_transfer
from bench.pull_choice import Cell, cells, measured, outcome, truth, workers_of
from router.placement import PullRates

CELL = Cell(length=8192, prefill=2000.0, link=1e5, share=0.9, queue_s=5.0, kind="bare", start_s=0.002)


def test_the_truth_is_every_way_by_hand() -> None:
    ways = {(way.worker, way.plan): way.seconds for way in truth(CELL, workers_of(CELL))}
    cached = 7360
    assert CELL.cached == cached
    assert ways["holder", "recompute"] == pytest.approx(5.0 + (8192 - cached) / 2000)
    assert ways["idle", "recompute"] == pytest.approx(8192 / 2000)
    loaded = 0.1 * cached / 2000
    assert ways["idle", "pull"] == pytest.approx(0.002 + cached / 1e5 + loaded + (8192 - cached) / 2000)
    assert ("holder", "pull") not in ways


def test_a_choice_by_wrong_rates_is_seen_to_be_worse() -> None:
    right = outcome(CELL, random.Random(1), measured(CELL, random.Random(1), 0.05), 0.05)
    assert (right.chosen.plan, right.best.plan) == ("pull", "pull") and right.ratio == pytest.approx(1.0)
    dear = outcome(CELL, random.Random(1), PullRates(99.0, 0.0), 0.05)
    assert dear.chosen.plan == "recompute" and dear.ratio > 2
    slow = Cell(length=32_768, prefill=50_000.0, link=2000.0, share=0.99, queue_s=0.5, kind="bare", start_s=0.002)
    deceived = outcome(slow, random.Random(1), PullRates(0.0, 1e-9), 0.05)
    assert deceived.chosen.plan == "pull" and deceived.ratio > 1.3
    # Its deadline is what bounds it.
    whole = next(way.seconds for way in truth(slow, workers_of(slow)) if way.plan == "pull")
    assert deceived.chosen.seconds < whole / 10


def test_choices_on_a_part_of_the_grid_are_near_the_best() -> None:
    rng = random.Random(3)
    some = rng.sample(list(cells()), 60)
    assert {cell.kind for cell in some} == set(pull_choice.KINDS)
    assert max(outcome(cell, rng, measured(cell, rng, 0.05), 0.05).ratio for cell in some) <= pull_choice.BOUND


def test_the_command_prints_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pull_choice, "LENGTHS", (8192,))
    monkeypatch.setattr(pull_choice, "LINK_TOKENS_PER_S", (2000.0,))
    monkeypatch.setattr(pull_choice, "TIMES", 1)
    assert pull.main(["--part", "choice", "--json"]) == 1
    [document] = json.loads(capsys.readouterr().out)
    # Over a link as slow as that some ways are best nowhere, and the claim that each is somewhere is missed.
    missed = [claim["says"] for claim in document["claims"] if not claim["met"]]
    assert "ways that are best somewhere" in missed
    assert document["rows"][0]["worst"] <= pull_choice.BOUND


@pytest.mark.timeout(100)
def test_blocks_are_sent_between_two_processes_and_compared() -> None:
    kind = pull_transfer.Kind("small", 4096, (8, 32))
    transfer, shortcut = pull_transfer.run((kind,), 1)
    assert transfer.claims[0].met and [row["blocks"] for row in transfer.rows] == [8, 32]
    assert all(float(row["pull ms"]) > 0 and row["bytes/block"] == 4096 for row in transfer.rows)
    assert all(float(row["ms/MB"]) > 0 for row in shortcut.rows)
