"""What benchmarks say of fleets, on small ones of real processes: the simulator's hits, and shares over full queues."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.fleet_replay import PLACEMENTS, real, simulated, step_overhead_s
from bench.shares import CASES, HEAVY, LIGHT, measure
from bench.simulate.replay import FleetShape
from bench.simulate.trace import read_trace
from bench.traces import Scenario, generate, write_trace

CONVERSATIONS = Scenario(
    requests=60, sessions_per_s=1.5, block_size=16, turns=4, mean_turn=60, mean_answer=4, mean_pause_s=1.5
)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("policy", PLACEMENTS)
def test_the_simulator_finds_what_a_real_fleet_finds(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(generate(CONVERSATIONS), path)
    trace = read_trace(path, 16, 16)
    shape = FleetShape(workers=2, cache_fraction=0.6, step_s=0.01, load=0.7)
    model, fleet = simulated(trace, shape, policy), real(trace, shape, policy)
    assert fleet.refused == model.refused == 0
    assert fleet.hit_ratio == pytest.approx(model.hit_ratio, abs=0.1)


@pytest.mark.timeout(90)
def test_what_a_step_takes_beside_the_runner_is_measured_on_the_fleet(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(generate(CONVERSATIONS), path)
    assert step_overhead_s(read_trace(path, 16, 16), FleetShape(workers=2, step_s=0.01, batch_tokens=4)) > 0.0


@pytest.mark.timeout(90)
def test_a_flood_over_several_routers_leaves_a_tenant_its_share() -> None:
    """Without a rule for full queues the light tenant gets a small part of it, or nothing."""
    case = CASES["full queues, light through one router"]
    served = measure(replace(case, step_ms=20.0, settle_s=3.0, seconds=10.0))
    assert served[HEAVY].refused > 0
    assert served[HEAVY].unhinted == served[LIGHT].unhinted == 0
    assert served[HEAVY].service / served[LIGHT].service == pytest.approx(4.0, rel=0.25)
