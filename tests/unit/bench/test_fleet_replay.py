"""What is simulated beside a real fleet, without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import fleet_replay
from bench.fleet_replay import compare, main, simulated
from bench.simulate.replay import FleetShape
from bench.simulate.trace import Trace, read_trace
from bench.traces import Scenario, generate, write_trace

AGENTS = Scenario(requests=60, sessions_per_s=0.5, block_size=16, turns=4, fan=3, mean_turn=60, mean_answer=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    write_trace(generate(AGENTS), path)
    return path


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Trace]:
    """The traces that were sent to a real fleet whose steps take 50 ms more than their runner's."""
    traces: list[Trace] = []

    def real(trace: Trace, shape: FleetShape, policy: str) -> Any:
        traces.append(trace)
        return simulated(trace, shape, policy)

    monkeypatch.setattr(fleet_replay, "step_overhead_s", lambda trace, shape: 0.05)
    monkeypatch.setattr(fleet_replay, "real", real)
    return traces


def test_the_simulation_has_the_steps_that_were_measured(path: Path, sent: list[Trace]) -> None:
    trace, shape = read_trace(path, 16, 16), FleetShape(workers=2, step_s=0.01)
    finding = compare(trace, shape, ["round_robin"])
    model, fleet = finding.rows
    assert model["TTFT mean s"] > fleet["TTFT mean s"] + 0.05  # type: ignore[operator]
    assert "measured 50.00 ms more" in finding.setting


def test_requests_of_one_moment_can_be_sent_one_after_the_other(path: Path, sent: list[Trace]) -> None:
    for options, distinct in ([], False), (["--spread"], True):
        main(["--trace", str(path), "--block-size", "16", "--policy", "pando", "--workers", "2", *options])
        moments = [request.arrival_s for request in sent.pop().requests]
        assert (len(set(moments[:-3])) == len(moments[:-3])) is distinct
