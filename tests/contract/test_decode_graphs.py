"""Steps of decoding through static plans, in Triton's interpreter, where a recorder that calls again stands in for CUDA
graphs: the same tokens as on the plain path, and whatever fits no graph goes there."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from kernels import device
from kernels.configs import DecodeConfig, Processor, Tuning, WideConfig
from tests.oracle import make_checkpoint
from tests.runner_driver import Driver, load, random_tokens
from worker import graphs
from worker.batch import Batch, SamplingParams, ScheduledSequence
from worker.model_runner import ModelRunner

# Rows that fill up a recording hold whatever was in memory, which the interpreter's arithmetic complains of.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow", "invalid value", "All-NaN", "divide by zero")
]

MAX_SEQUENCES = 4
SMALL = Tuning(
    DecodeConfig(tile=16, num_stages=2), *[WideConfig(tile=32)] * 2, Processor(multiprocessors=1), share=False
)


class Again:
    """A recording that runs anew and leaves the result where the first one was."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self.run = run
        self.out = run().clone()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.out.copy_(self.run())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("graphs") / "model"
    make_checkpoint(made, "qwen3")
    return made


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_operations", lambda tensor: device)
    monkeypatch.setattr("kernels.static_plan.device_tuning", lambda kv_cache: SMALL)  # little room: programs are slow


def recorded(runner: ModelRunner, record: Callable[..., object] = Again) -> dict[tuple[int, bool], Again]:
    """Give the runner graphs; what was recorded for each size."""
    runner.graphs = graphs.record(runner.decoder, runner.cache, MAX_SEQUENCES, record)  # type: ignore[arg-type]
    return {} if runner.graphs is None else runner.graphs._recordings  # type: ignore[return-value]


def tokens_of(runner: ModelRunner, replays: Callable[[], int] = lambda: 0) -> list[list[int]]:
    """Three prompts, two steps of decoding together, then one beside a prompt, then one alone."""
    driver = Driver(runner)
    prompts = [driver.start(random_tokens(length, seed=length)) for length in (3, 14, 5)]
    driver.step(prompts)
    assert replays() == 0
    for _ in range(2):
        driver.step(prompts)
    late = driver.start(random_tokens(2, seed=6))
    driver.step([prompts[2], late])
    driver.step(prompts[1:2])
    return [driven.tokens for driven in (*prompts, late)]


@pytest.mark.parametrize("settings", [{}, {"window": 12, "sinks": 3}, {"kv_dtype": "int8"}], ids=str)
def test_tokens_are_those_of_the_plain_path(folder: Path, settings: dict[str, Any]) -> None:
    runner = load(folder, device_blocks=12, **settings)
    expected = tokens_of(runner)
    made = recorded(runner)
    assert tokens_of(runner, lambda: sum(recording.replays for recording in made.values())) == expected
    replays = {key: recording.replays for key, recording in made.items()}
    assert replays == {(4, False): 2, (2, False): 0, (1, False): 1}
    runner.close()
    assert runner.graphs is None


def test_a_replayed_step_follows_draws_that_the_host_has_not_seen(folder: Path) -> None:
    runner = load(folder, device_blocks=4)

    def two_steps() -> list[int]:
        first = ScheduledSequence(0, array("I", random_tokens(5, seed=5)), 0, [0, 1, 2], SamplingParams())
        second = ScheduledSequence(0, array("I", [0]), 5, [0, 1, 2], SamplingParams(), follows=0)
        steps = [runner.launch(Batch((share,))) for share in (first, second)]
        return [token for step in steps for token in step.tokens()]

    expected = two_steps()
    made = recorded(runner)
    assert two_steps() == expected
    assert sum(recording.replays for recording in made.values()) == 1
    runner.close()


def test_a_step_that_fits_no_graph_takes_the_plain_path(folder: Path) -> None:
    runner = load(folder, device_blocks=24)
    made = recorded(runner)
    driver = Driver(runner)
    prompts = [driver.start(random_tokens(4, seed=seed)) for seed in range(MAX_SEQUENCES + 1)]
    for _ in range(2):
        driver.step(prompts)
    assert not any(recording.replays for recording in made.values())
    assert all(len(driven.tokens) == 6 for driven in prompts)
    runner.close()


def test_recording_writes_no_kv(folder: Path) -> None:
    runner = load(folder, device_blocks=4)
    runner.cache.blocks.fill_(7.0)
    recorded(runner)
    assert (runner.cache.blocks == 7.0).all()
    runner.close()


def test_without_memory_there_are_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(run: Callable[[], torch.Tensor]) -> graphs.Recording:
        raise torch.OutOfMemoryError("out of memory")

    runner = load(folder, device_blocks=4)
    with caplog.at_level(logging.WARNING):
        assert recorded(runner, fails) == {}
    assert "no CUDA graphs: out of memory" in caplog.text
    assert runner.graphs is None
    runner.close()


def test_sizes() -> None:
    assert graphs.sizes_for(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert graphs.sizes_for(1) == (1,)
    assert graphs.sizes_for(8) == (1, 2, 4, 8)
    assert graphs.sizes_for(13) == (1, 2, 4, 8, 13)
    assert graphs.sizes_for(1000)[-1] == 256
