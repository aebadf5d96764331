"""Deterministic mode's price: both engines do all of the work, in every round."""

from __future__ import annotations

import pytest

from bench.engine.__main__ import main
from bench.engine.deterministic import measure_cost
from pando.settings import WorkerSettings


def test_each_work_has_both_rates() -> None:
    settings = WorkerSettings(model="pando-tiny", device="cpu", dtype="float32", threads=1)
    found = measure_cost(settings, batches=(1, 2), prefill_tokens=48, rounds=2)
    assert [cost.work for cost in found] == ["prefill of 48", "decode, batch 1", "decode, batch 2"]
    assert all(cost.off > 0 and cost.on > 0 and cost.ratio == cost.on / cost.off for cost in found)


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert main(["deterministic", "--model", f"{tmp_path}/none"]) == 2
    assert "model" in capsys.readouterr().err
