"""What a comparison says: ratios within a round, claims met and missed, tables and the same as a document."""

from __future__ import annotations

import json

import pytest

from bench.engine.comparison import Results, Round
from bench.engine.drive import Figures
from bench.engine.machine import Machine
from bench.engine.report import CLAIMS, COLUMNS, Claim, document, judge, text
from bench.engine.roofline import Bound, Work
from bench.engine.tables import spread

MACHINE = Machine("one", 2, "2", "float32", read_gb_s=10.0, matmul_gflop_s=100.0, load_average=0.0)
RATE = Claim("workload_tokens_per_s", 1.3, "vllm")
BEST = Claim("ttft_p99_s", 1.0)
BOUNDS = {column: Bound(Work(1e9, 1.0), 1, not column.endswith("_s") or "tokens" in column) for column in COLUMNS}


def rounds_of(*figures: dict[str, Figures]) -> tuple[Round, ...]:
    return tuple(Round(number, tuple(each), 0.5, MACHINE, each) for number, each in enumerate(figures))


def rates(**values: float) -> dict[str, Figures]:
    return {name: {"workload_tokens_per_s": value} for name, value in values.items()}


def test_a_claim_is_judged_by_the_median_of_the_ratios_within_a_round() -> None:
    # Medians of each alone would be 10 and 10.
    found = judge(RATE, rounds_of(rates(pando=10, vllm=5), rates(pando=14, vllm=10), rates(pando=2, vllm=20)))
    assert found.ratios == (2.0, 1.4, 0.1) and found.ratio == 1.4 and found.holds is True
    assert judge(RATE, rounds_of(rates(pando=12, vllm=10))).holds is False
    assert judge(RATE, rounds_of(rates(pando=12))).holds is None


def test_the_best_peer_is_the_rounds_own_and_less_is_better_for_a_time() -> None:
    found = judge(
        BEST,
        rounds_of(
            {"pando": {"ttft_p99_s": 2.0}, "a": {"ttft_p99_s": 3.0}, "b": {"ttft_p99_s": 5.0}},
            {"pando": {"ttft_p99_s": 2.0}, "a": {"ttft_p99_s": 3.0}, "b": {"ttft_p99_s": 1.0}},
        ),
    )
    assert found.ratios == (1.5, 0.5) and found.against == ("a", "b")


def test_a_peer_that_cannot_reuse_counts_with_what_it_can() -> None:
    found = judge(BEST, rounds_of({"pando": {"ttft_p99_s": 2.0}, "a": {"without_ttft_p99_s": 1.0}}))
    assert found.ratios == (0.5,)


def test_a_spread_has_its_ends() -> None:
    assert spread([], 1) == "-" and spread([1.0], 1) == "1.0"
    assert spread([3.0, 1.0, 2.0], 0) == "2 (1 to 3)" and spread([0.5], 0, 100.0) == "50"


@pytest.fixture
def results() -> Results:
    figures = rates(pando=20.0, vllm=10.0)
    figures["pando"] |= {"others_cores": 0.01, "own_cores": 1.9}
    return Results(("pando", "vllm", "llama.cpp"), rounds_of(figures, figures), {"llama.cpp": "gone"}, {"other": "off"})


def test_a_document_has_medians_shares_claims_and_every_round(results: Results) -> None:
    found = json.loads(json.dumps(document(results, BOUNDS, {"dtype": "float32"})))
    assert found["dtype"] == "float32" and found["medians"]["pando"]["workload_tokens_per_s"] == 20.0
    assert found["medians"]["llama.cpp"] == {} and len(found["rounds"]) == 2
    shares = found["roofline"]["workload_tokens_per_s"]
    assert shares["limit"] == "GFLOP/s" and shares["shares"]["pando"] == [0.2, 0.2]
    assert [one["holds"] for one in found["claims"]] == [True, True, None, None, None, None]
    assert found["failures"] == {"llama.cpp": "gone"} and found["absent"] == {"other": "off"}


def test_the_text_says_what_is_missed_and_who_is_not_there(results: Results) -> None:
    said = text(results, BOUNDS, "title")
    assert said.count("not measured") == len(CLAIMS) - 2 and "| met" in said
    assert "failed: llama.cpp: gone" in said and "absent: other: off" in said
    assert "20 (20 to 20)" in said and "cores of the others" in said
    for block in said.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) <= 1
