"""What the demo concludes from two runs: percentiles, the TTFT ratio, the check of the second wave, the document."""

from __future__ import annotations

import json

import pytest

from bench.demo import Comparison, Run, document, summary, table
from bench.workload import Ask, Measured, Shape, percentile

SHAPE = Shape(tenants=2, head_tokens=40, waves=(2, 2, 2), max_tokens=4)


def run(*, reuse: bool, later_ttft_s: float, cached: int, answer: tuple[int, ...] = (1, 2, 3, 4)) -> Run:
    """Two tenants, three waves of one request each; the first wave takes a second and finds nothing."""
    measured = []
    for number in range(6):
        tenant, wave = "ab"[number % 2], number // 2
        ask = Ask(number, tenant, wave, tuple(range(50)))
        ttft = later_ttft_s if wave else 1.0
        measured.append(Measured(ask, ttft, ttft + 0.1, 50, cached if wave else 0, answer, f"worker-{number % 2}"))
    return Run(reuse, tuple(measured), wall_s=2.0)


def compare(*, cached: int = 32, warm_s: float = 0.1, answer: tuple[int, ...] = (1, 2, 3, 4)) -> Comparison:
    shared = run(reuse=True, later_ttft_s=warm_s, cached=cached, answer=answer)
    return Comparison(SHAPE, 16, shared, run(reuse=False, later_ttft_s=0.5, cached=0))


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([1, 2, 3, 4], 0.5, 2),
        ([1, 2, 3, 4], 0.99, 4),
        (list(range(1, 201)), 0.99, 198),
        ([2, 1], 0, 1),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_the_cold_wave_is_not_compared() -> None:
    assert compare().ttft_ratio == pytest.approx(0.2)


def test_full_blocks_are_what_a_warm_request_may_find() -> None:
    assert compare().full_block_tokens == 32
    assert compare(cached=32).ok
    assert not compare(cached=16).ok
    assert not compare(cached=48).ok


def test_the_goal_must_be_met() -> None:
    assert compare(warm_s=0.175).ok
    assert not compare(warm_s=0.18).ok


def test_different_answers_are_counted() -> None:
    assert compare().equal_answers == 6
    assert compare(answer=(9, 9, 9, 9)).equal_answers == 0


def test_the_document_is_json_and_adds_up() -> None:
    found = json.loads(json.dumps(document(compare())))
    assert found["ok"] is True and found["ttft_ratio"] == 0.2
    assert found["second_wave"] == {"full_block_tokens": 32, "cached_tokens": [32], "all_blocks_hit": True}
    assert [wave["ratio"] for wave in found["waves"]] == [1.0, 0.2, 0.2]
    total = found["with_reuse"]["total"]
    assert (total["requests"], total["prompt_tokens"], total["cached_tokens"]) == (6, 300, 128)
    assert total["worker_spread"] == {"worker-0": 3, "worker-1": 3}
    assert found["with_reuse"]["prompt_tokens_computed"] == 172
    assert found["without_reuse"]["tenants"]["a"]["tokens_per_s"] == 6.0


def test_the_table_has_a_row_a_tenant_and_one_for_all() -> None:
    assert table(compare()).row_count == 3


def test_the_summary_says_when_blocks_were_missed() -> None:
    assert "NOT every full block" in " ".join(summary(compare(cached=16)))
    assert "0.20x" in summary(compare())[0]
