"""The runner behind the `Runner` face: what it says of itself, what it executes, what it refuses at start."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from pando.errors import ConfigError
from tests.oracle import make_checkpoint
from tests.runner_driver import Driver, load, random_tokens
from worker.batch import Batch, BlockCopy, Direction, SamplingParams, Transfer, TransferEnd
from worker.metrics import StepMetrics
from worker.model_runner import ModelRunner


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runner") / "small-model"
    make_checkpoint(made, "qwen3")
    return made


@pytest.fixture(scope="session")
def runner(folder: Path) -> ModelRunner:
    return load(folder)


def test_spec(runner: ModelRunner) -> None:
    spec = runner.spec
    assert (spec.name, spec.vocab_size, spec.max_model_len) == ("small-model", 1031, 512)
    assert (spec.num_blocks, spec.block_size, spec.eos_token_ids) == (160, 8, (2,))
    assert len(spec.fingerprint) == 16
    assert not runner.runs_beside


def test_fingerprint_is_equal_for_equal_workers_only(folder: Path, runner: ModelRunner) -> None:
    assert load(folder, block_size=16, device_blocks=40).spec.fingerprint == runner.spec.fingerprint
    assert load(folder, dtype="bfloat16").spec.fingerprint != runner.spec.fingerprint


def test_only_sequences_at_their_end_are_sampled(runner: ModelRunner) -> None:
    driver = Driver(runner)
    first, second = driver.start(random_tokens(30, seed=1)), driver.start(random_tokens(10, seed=2))
    assert len(runner.execute(Batch((driver.share(first, 20), driver.share(second, 20))))) == 1
    assert runner.execute(Batch((driver.share(driver.start(random_tokens(30, seed=1)), 5),))) == []
    assert len(runner.execute(Batch((driver.share(first, 20),)))) == 1


def test_sampled_tokens_are_the_same_in_any_batch(runner: ModelRunner) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=77)
    driver = Driver(runner, 1)
    alone = driver.start(random_tokens(25, seed=3))
    together = driver.start(alone.tokens)
    others = [driver.start(random_tokens(length, seed=length)) for length in (3, 60, 14)]
    for _ in range(24):
        driver.step([alone], sampling=sampling)
    for _ in range(24):
        driver.step([*others[:2], together, others[2]], sampling=sampling)
    assert together.tokens == alone.tokens
    assert len(set(alone.tokens[25:])) > 12


def test_logits_do_not_depend_on_sampling(runner: ModelRunner) -> None:
    driver = Driver(runner, 2)
    tokens = random_tokens(12, seed=5)
    logits = driver.logits(driver.start(tokens))
    assert logits.shape == (12, 1031)
    sequence = driver.start(tokens)
    driver.step([sequence])
    assert sequence.tokens[-1] == logits[-1].argmax()


def test_the_pool_bounds_the_length(folder: Path) -> None:
    assert load(folder, device_blocks=10).spec.max_model_len == 80
    assert load(folder, max_model_len=100).spec.max_model_len == 100
    with pytest.raises(ConfigError, match="--max-model-len 513 is over the model's own 512"):
        load(folder, max_model_len=513)


def test_a_pool_is_sized_from_free_memory(folder: Path) -> None:
    runner = load(folder, device_blocks=0)
    assert 160 < runner.spec.num_blocks * runner.cache.blocks[0].nbytes <= 2 * 1024**3
    runner.close()


def test_a_small_model_runs_on_one_thread_unless_told(folder: Path) -> None:
    load(folder, threads=0)
    assert kernels.num_threads() == 1
    load(folder, threads=2)
    assert kernels.num_threads() == 2
    kernels.set_num_threads(0)
    torch.set_num_threads(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device cuda was asked for"):
        load(folder, device="cuda")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path / "nothing")


def test_forks_are_drawn_after_the_same_token(runner: ModelRunner) -> None:
    driver = Driver(runner, 3)
    tokens = random_tokens(21, seed=8)
    draws = [SamplingParams(temperature=1.5, seed=seed) for seed in range(6)]
    alone = []
    for sampling in draws:
        sequence = driver.start(tokens)
        driver.step([sequence], sampling=sampling)
        alone.append(sequence.tokens[-1])
    share = replace(driver.share(driver.start(tokens), sampling=draws[0]), fork_sampling=tuple(draws[1:]))
    other = driver.share(driver.start(tokens), sampling=draws[3])
    assert runner.execute(Batch((share, other))) == [*alone, alone[3]]
    assert len(set(alone)) > 2


def test_copies_are_carried_out_in_order(runner: ModelRunner) -> None:
    blocks = runner.cache.blocks
    before = blocks[:6].clone()
    copies = tuple(BlockCopy(source, target, 8) for source, target in [(0, 1), (1, 2), (3, 4), (5, 4), (4, 3)])
    far = list(range(100, 140))
    share = replace(Driver(runner).share(Driver(runner).start([7])), block_ids=far)
    runner.execute(Batch((share,), copies))
    assert torch.equal(blocks[:6], before[[0, 0, 0, 5, 5, 5]])


def ended(runner: ModelRunner, count: int) -> list[TransferEnd]:
    assert runner.mover is not None
    found: list[TransferEnd] = []
    limit = time.monotonic() + 20
    while len(found) < count and time.monotonic() < limit:
        found += runner.mover.take_ended()
    return found


@pytest.mark.parametrize("cpu_dtype", ["same", "int8"])
def test_a_sequence_goes_to_the_cpu_and_comes_back(folder: Path, cpu_dtype: str) -> None:
    runner = load(folder, cpu_blocks=8, cpu_kv_dtype=cpu_dtype, device_blocks=20)
    assert runner.mover is not None
    assert runner.mover.num_blocks == 8
    driver = Driver(runner, 4)
    tokens = random_tokens(40, seed=9)
    first = driver.start(tokens[:32])
    driver.step([first])
    before = runner.cache.blocks[first.blocks].clone()
    runner.mover.start([Transfer(n, Direction.DEMOTE, block, n) for n, block in enumerate(first.blocks)])
    spoiler = driver.start(random_tokens(32, seed=10))
    spoiler.blocks = list(first.blocks)  # the next step writes all four sources
    driver.step([spoiler])
    assert [end.ok for end in ended(runner, 4)] == [True] * 4
    targets = [driver.free.pop() for _ in range(4)]
    runner.mover.start([Transfer(9 + n, Direction.PROMOTE, n, block) for n, block in enumerate(targets)])
    assert [end.ok for end in ended(runner, 4)] == [True] * 4
    again = driver.start(tokens)
    again.blocks, again.computed = list(targets), 32
    expected = driver.logits(driver.start(tokens))[32:]
    wrong = (driver.logits(again) - expected).abs().max()
    if cpu_dtype == "same":
        assert torch.equal(runner.cache.blocks[targets], before)
        assert wrong < 1e-4
    else:
        assert 0 < runner.mover.largest_error < 0.01
        metrics = StepMetrics(lambda report: None, model="m", worker="w")
        metrics.watch_error(runner.mover)
        told = metrics.registry.get_sample_value("pando_kv_cpu_error_ratio", {"model_name": "m", "worker": "w"})
        assert told == runner.mover.largest_error
        assert wrong < 0.5
    runner.close()


def test_closed_runner_computes_nothing(folder: Path) -> None:
    runner = load(folder)
    share = Driver(runner).share(Driver(runner).start([5, 6]))
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.execute(Batch((share,)))


def test_needs_neither_ray_nor_redis_nor_transformers() -> None:
    program = (
        "import sys, worker.model_runner; print([m for m in ('ray', 'redis', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
