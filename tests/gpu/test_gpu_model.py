"""The model runner on CUDA against the same runner on the CPU, over the built-in model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.runner_driver import Driver, load, random_tokens
from worker.batch import Batch, SamplingParams
from worker.model_runner import ModelRunner
from worker.sampler import Draw, start

MODEL = "pando-tiny"


def tokens(length: int, seed: int) -> list[int]:
    return random_tokens(length, seed, vocab_size=2000)


@pytest.fixture(scope="module")
def cpu() -> Iterator[ModelRunner]:
    runner = load(MODEL)
    yield runner
    runner.close()


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def cuda(request: pytest.FixtureRequest) -> Iterator[ModelRunner]:
    runner = load(MODEL, device="cuda", dtype=request.param)
    yield runner
    runner.close()


def test_logits_in_chunks_over_shuffled_blocks(cpu: ModelRunner, cuda: ModelRunner) -> None:
    expected = Driver(cpu).logits(Driver(cpu).start(tokens(90, seed=1)))
    driver = Driver(cuda, seed=2)
    ours = driver.logits(driver.start(tokens(90, seed=1)), chunk=37)
    error = (ours - expected).norm() / expected.norm()
    assert error < {torch.float32: 2e-3, torch.bfloat16: 0.06, torch.float16: 0.01}[cuda.cache.blocks.dtype]


def test_tokens_are_the_same_in_a_batch(cuda: ModelRunner) -> None:
    driver = Driver(cuda)
    alone = driver.start(tokens(40, seed=3))
    driver.generate([alone], 24)
    batch = [driver.start(tokens(length, seed=3 + (length != 40))) for length in (12, 40, 77)]
    together = driver.generate(batch, 24)[1]
    same = sum(mine == other for mine, other in zip(alone.tokens[40:], together, strict=True))
    assert same == 24 or cuda.cache.blocks.dtype != torch.float32


@pytest.mark.parametrize(("kv_dtype", "allowed"), [("int8", 0.06), ("fp8", 0.12), ("int4", 0.5)])
def test_logits_over_kv_in_fewer_bits(cpu: ModelRunner, kv_dtype: str, allowed: float) -> None:
    expected = Driver(cpu).logits(Driver(cpu).start(tokens(90, seed=1)))
    runner = load(MODEL, device="cuda", dtype="bfloat16", kv_dtype=kv_dtype)
    runner.cache.blocks.fill_(0xFF)
    driver = Driver(runner, seed=2)
    ours = driver.logits(driver.start(tokens(90, seed=1)), chunk=37)
    assert (ours - expected).norm() / expected.norm() < allowed
    runner.close()


def test_drawn_tokens_repeat(cuda: ModelRunner) -> None:
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=11)
    driver = Driver(cuda)
    runs = []
    for _ in range(2):
        sequence = driver.start(tokens(20, seed=5))
        for _ in range(16):
            driver.step([sequence], sampling=sampling)
        runs.append(sequence.tokens)
    assert runs[0] == runs[1]


def test_a_pool_is_sized_within_the_fraction() -> None:
    runner = load(MODEL, device="cuda", dtype="bfloat16", device_blocks=0, memory_fraction=0.5)
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.55 * total
    runner.close()


def test_replayed_steps_give_what_the_plain_path_gives(cuda: ModelRunner) -> None:
    """Steps of three sequences in a graph of four, shared blocks and all, then beside a prompt, then one alone."""
    assert cuda.graphs is not None
    found = []
    for recorded in (cuda.graphs, None):
        graphs, cuda.graphs = cuda.graphs, recorded
        driver = Driver(cuda, seed=4)
        first = driver.start(tokens(200, seed=1))
        driver.step([first])
        others = [driver.start(first.tokens[:192] + tokens(9, seed=n), prefix=first, cached=192) for n in (2, 3)]
        driver.step(others)
        for _ in range(20):
            driver.step([first, *others])
        driver.step([first, driver.start(tokens(30, seed=5))])
        driver.step([first])
        found.append([driven.tokens[-20:] for driven in (first, *others)])
        cuda.graphs = graphs
    same = sum(a == b for ours, theirs in zip(*found, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert same == 60 or cuda.cache.blocks.dtype != torch.float32  # libraries choose products by the number of rows


def test_hidden_states_of_a_replay(cuda: ModelRunner) -> None:
    assert cuda.graphs is not None
    hidden = []
    for recorded in (cuda.graphs, None):
        graphs, cuda.graphs = cuda.graphs, recorded
        driver = Driver(cuda, seed=5)
        sequences = [driver.start(tokens(length, seed=length)) for length in (7, 100, 31)]
        driver.step(sequences)
        batch = Batch(tuple(driver.share(sequence) for sequence in sequences))
        with torch.inference_mode():
            hidden.append(cuda._hidden(batch, cuda._inputs(batch), np.arange(3)).float())
        cuda.graphs = graphs
    error = (hidden[0] - hidden[1]).norm() / hidden[1].norm()
    assert error < {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.004}[cuda.cache.blocks.dtype]


def test_a_step_of_decoding_waits_for_its_tokens_alone(cuda: ModelRunner) -> None:
    driver = Driver(cuda)
    sequences = [driver.start(tokens(length, seed=length)) for length in (7, 40)]
    driver.generate(sequences, 3)
    draws = [Draw(SamplingParams(temperature=0.8, top_p=0.9, seed=n), n, (1, 2)) for n in range(2)]
    logits = torch.randn(2, 2003, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = start(logits, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 <= token < 2003 for token in drawn.tolist())


def test_graphs_may_be_off() -> None:
    runner = load(MODEL, device="cuda", dtype="bfloat16", cuda_graphs="off")
    assert runner.graphs is None
    runner.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_mode(dtype: str) -> None:
    runner = load(MODEL, device="cuda", dtype=dtype, deterministic="on")
    driver = Driver(runner)
    whole = driver.logits(driver.start(tokens(90, seed=1)))
    assert torch.equal(driver.logits(driver.start(tokens(90, seed=1)), chunk=37), whole)
    assert torch.equal(driver.logits(driver.start(tokens(90, seed=1)), chunk=1), whole)
    alone = driver.start(tokens(40, seed=3))
    driver.generate([alone], 24)
    batch = [driver.start(tokens(length, seed=3 + (length != 40))) for length in (12, 40, 77)]
    assert driver.generate(batch, 24)[1] == alone.tokens[40:]
    runner.close()
