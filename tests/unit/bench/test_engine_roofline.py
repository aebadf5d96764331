"""Bounds: what is counted for each column, and which rate of the machine is the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.engine.alone import prefill_flop
from bench.engine.checkpoints import SHAPES, write_checkpoint
from bench.engine.machine import Machine
from bench.engine.roofline import COMPUTE, MEMORY, Model, Work, bounds
from bench.engine.scenario import MultiTenant
from worker.models.config import read_config

MACHINE = Machine("one", 2, "2", "float32", read_gb_s=10.0, matmul_gflop_s=100.0, load_average=0.0)
SCENARIO = MultiTenant(tenants=2, system_tokens=100, requests=8, unique_tokens=10, output_tokens=5, concurrency=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(folder, SHAPES["llama-40m"], 0)
    return Model(read_config(folder), 4)


def test_work_takes_the_longer_of_both() -> None:
    assert Work(200e9, 10e9).seconds(MACHINE) == 2.0 and Work(200e9, 10e9).limit(MACHINE) == COMPUTE
    assert Work(100e9, 30e9).seconds(MACHINE) == 3.0 and Work(100e9, 30e9).limit(MACHINE) == MEMORY


def test_a_prompt_in_two_parts_is_the_prompt(model: Model) -> None:
    whole = model.flop(0, 110, 1)
    assert model.flop(0, 100, 0) + model.flop(100, 10, 1) == pytest.approx(whole)
    assert whole == pytest.approx(prefill_flop(model.config, 110))


def test_reuse_leaves_less_to_do(model: Model) -> None:
    found = bounds(model, SCENARIO)
    assert found["workload_tokens_per_s"].value(MACHINE) > found["without_tokens_per_s"].value(MACHINE)
    assert found["ttft_p50_s"].value(MACHINE) < found["without_ttft_p50_s"].value(MACHINE)
    assert found["ttft_p99_s"].value(MACHINE) < found["without_ttft_p99_s"].value(MACHINE)


def test_decoding_reads_and_a_prompt_computes(model: Model) -> None:
    found = bounds(model, SCENARIO)
    assert found["decode_tokens_per_s"].work.limit(MACHINE) == MEMORY
    assert found["prefill_tokens_per_s"].work.limit(MACHINE) == COMPUTE
    assert model.read(10) - model.read(0) == 10 * model.kv_token_bytes


def test_a_share_is_1_at_the_bound_and_less_where_it_is_slower(model: Model) -> None:
    for bound in bounds(model, SCENARIO).values():
        value = bound.value(MACHINE)
        assert bound.share(value, MACHINE) == pytest.approx(1.0)
        assert bound.share(value / 2 if bound.is_rate else value * 2, MACHINE) == pytest.approx(0.5)
