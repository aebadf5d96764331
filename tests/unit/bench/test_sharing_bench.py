"""The sharing benchmarks at sizes of a unit test: by count, never by time."""

from __future__ import annotations

import json
import random

import pytest

from bench.sharing import burst, flight, forks, memory, multi_turn, offload, tenants
from bench.sharing.__main__ import main
from bench.sharing.finding import Claim, Finding
from bench.sharing.local_worker import LocalWorker, WorkerShape, random_tokens
from kvstore.scope import Region
from worker.batch import SamplingParams

WORKER = WorkerShape(num_blocks=1, block_size=4, max_batch_tokens=64)


def quiet(line: str) -> None:
    """Say nothing."""


def column(finding: Finding, name: str) -> dict[str, float]:
    return {str(row["run"]): float(row[name]) for row in finding.rows}


def test_a_published_head_is_computed_once_and_no_tail_is_seen() -> None:
    shape = tenants.TenantsShape(tenants=6, head=40, opening=3, tail=20, probes=200)
    finding = tenants.run(shape, WORKER, quiet)
    assert finding.met, finding.claims
    heads = column(finding, "head tokens computed")
    assert heads["published head"] == heads["one scope"] == 40
    assert heads["no sharing"] == 6 * 40


@pytest.mark.parametrize("head", [41, 42, 43])
def test_a_head_that_ends_inside_a_block_is_computed_once_too(head: int) -> None:
    shape = tenants.TenantsShape(tenants=6, head=head, opening=3, tail=20, probes=200)
    finding = tenants.run(shape, WORKER, quiet)
    assert finding.met, finding.claims
    assert column(finding, "head tokens computed")["published head"] == head


def test_heads_are_told_apart() -> None:
    shapes = [tenants.TenantsShape(tenants=6, head=head, opening=3, tail=20, probes=20) for head in (40, 42)]
    finding = tenants.run_all(shapes, WORKER, quiet)
    assert finding.met, finding.claims
    assert [row["head"] for row in finding.rows] == [40] * 3 + [42] * 3
    assert len({claim.says for claim in finding.claims}) == 8


def test_probes_see_a_store_that_leaks() -> None:
    shape = tenants.TenantsShape(tenants=3, head=16, opening=2, tail=12, turns=1, probes=50)
    worker = LocalWorker(WorkerShape(num_blocks=100, block_size=4))
    prompts = tenants.make_prompts(shape)
    # As if tails were in everybody's scope.
    for (tokens,) in prompts:
        worker.submit(tokens, worker.regions("all"), sampling=SamplingParams(max_tokens=1))
    worker.run()
    worker.regions = lambda tenant, public=0: (Region(worker.root("tenant:all"), None),)  # type: ignore[method-assign]
    leaks, own = tenants.probe(shape, worker, prompts, quiet)
    assert (leaks, own) == (50, 100.0)
    worker.close()


def test_identical_cold_prompts_are_computed_once() -> None:
    finding = flight.run(flight.FlightShape(requests=8, prompt=200, answer=4), WORKER, quiet)
    assert finding.met, finding.claims
    assert column(finding, "prompt tokens computed") == {"reuse": 200 + 7, "no reuse": 1600}


def test_forks_hold_shared_and_private_blocks() -> None:
    finding = forks.run(forks.ForksShape(answers=4, prompt=30, answer=9), WORKER, quiet)
    assert finding.met, finding.claims
    # Positions 0 to 37: seven full blocks of the prompt, and blocks 7 to 9 for each answer.
    assert column(finding, "most blocks held")["forks"] == 7 + 4 * 3


def test_forks_need_a_prompt_that_ends_inside_a_block() -> None:
    with pytest.raises(ValueError, match="inside a block"):
        forks.run(forks.ForksShape(prompt=32), WORKER, quiet)


def test_a_burst_costs_only_who_has_no_floor() -> None:
    shape = burst.BurstShape(pool=64, floor=36, ceiling=16, prompt_blocks=4, own_prompts=6)
    finding = burst.run(shape, WORKER, quiet)
    assert finding.met, finding.claims
    assert column(finding, "change")["burst, no quotas, lru"] < -10


def test_conversations_larger_than_the_device_come_back_from_the_cpu_tier() -> None:
    shape = multi_turn.MultiTurnShape(conversations=8, turns=3, first=40, question=8, answer=8, at_once=1)
    finding = multi_turn.run(shape, WORKER, quiet)
    assert finding.met, finding.claims
    assert column(finding, "loaded tokens")["CPU tier"] > 0


def test_offload_compares_both_kinds_on_the_same_texts() -> None:
    shape = offload.OffloadShape(
        requests=6, prefix=64, tail=12, question=6, answer=4, other=80, device=32, cpu=256, repetitions=2
    )
    finding = offload.run(shape, WORKER, quiet)
    computed = column(finding, "prompt tokens computed")
    assert computed["CPU tier"] <= computed["no CPU tier"]
    assert column(finding, "demoted blocks")["no CPU tier"] == 0
    assert {claim.relation for claim in finding.claims} <= {"<=", ">=", "<", "="}


def test_a_simulated_run_of_offload_is_the_same_each_time() -> None:
    shape = offload.OffloadShape(
        requests=8, prefix=64, tail=24, question=6, answer=4, other=80, device=40, cpu=256, repetitions=2
    )
    first, second = (offload.run(shape, WORKER, quiet) for _ in range(2))
    assert first.met, first.claims
    assert first.claims == second.claims
    assert [{**row, "CPU s": 0} for row in first.rows] == [{**row, "CPU s": 0} for row in second.rows]
    assert column(first, "loaded tokens")["CPU tier"] > 0


def test_memory_measures_every_size() -> None:
    finding = memory.run(memory.MemoryShape(blocks=(64, 128), rounds=1), quiet)
    assert [row["num_blocks"] for row in finding.rows] == [64, 128]
    assert all(float(row["bytes_sealed"]) > float(row["bytes_empty"]) > 0 for row in finding.rows)


def test_counts_of_a_worker_are_those_of_its_batches() -> None:
    worker = LocalWorker(WorkerShape(num_blocks=64, block_size=4))
    tokens = random_tokens(random.Random(0), 21)
    for _ in range(2):
        worker.submit(tokens, worker.regions("a"), sampling=SamplingParams(max_tokens=3))
        worker.run()
    first, second = worker.answers.values()
    assert (first.computed, first.cached) == (21, 0)
    assert (second.computed, second.cached) == (1, 20)
    assert first.token_ids == second.token_ids
    assert worker.hit_percent == pytest.approx(100 * 20 / 42)
    worker.close()


@pytest.mark.parametrize(
    ("relation", "bound", "met"),
    [("<=", 2.0, True), ("<", 2.0, False), (">=", 2.0, True), ("=", 2.0, True), (">=", 2.1, False), ("=", 1.0, False)],
)
def test_a_claim_is_met_by_its_number(relation: str, bound: float, met: bool) -> None:
    assert Claim("a", 2.0, relation, bound).met is met
    assert Finding("a", "b", ({"run": 1},), (Claim("a", 2.0, relation, bound),)).met is met


def test_the_command_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scenario", "forks", "--json"]) == 0
    out, err = capsys.readouterr()
    (document,) = json.loads(out)
    assert document["scenario"] == "forks" and all(claim["met"] for claim in document["claims"])
    assert "forks: " in err


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scenario", "forks"]) == 0
    assert "prompt tokens computed" in capsys.readouterr().out
