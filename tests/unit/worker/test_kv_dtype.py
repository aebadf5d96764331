"""KV kept in another type than the activations: reuse gives the tokens that computing gives; nothing is mixed up."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pando.errors import ConfigError
from pando.settings import WorkerSettings
from tests.oracle import make_checkpoint
from tests.runner_driver import Driver, load, random_tokens
from worker import kv_cache
from worker.checks import check_settings
from worker.models.config import read_config

MakeWorld = Callable[..., Any]
KV_DTYPES = ["float32", "bfloat16", "float16", "int8", "fp8", "int4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kv-dtype") / "model"
    make_checkpoint(made, "qwen3")
    return made


def poison(blocks: torch.Tensor, which: list[int] | slice = slice(None)) -> None:
    """NaN as a number and, where it is bytes, as a scale."""
    blocks[which] = 0xFF if blocks.dtype is torch.uint8 else torch.nan


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_cold_warm_and_reloaded_give_equal_tokens(world: MakeWorld, folder: Path, kv_dtype: str) -> None:
    runner = load(folder, kv_dtype=kv_dtype, device_blocks=24, cpu_blocks=160)
    poison(runner.cache.blocks)
    fleet = world(runner=runner, max_batch_tokens=64, max_model_len=160)
    fleet.prefill_tokens_per_s = 1.0
    tokens = random_tokens(75, seed=4)

    def facts(sequence: int) -> tuple[int, int]:
        said = fleet.results[sequence].outputs[0].admission
        return said.cached_device_tokens, said.cached_cpu_tokens

    answers = []
    for _ in range(2):
        answers.append(fleet.submit(tokens, max_tokens=12))
        fleet.run()
    for seed in range(6):  # until nothing of it is left on the device
        fleet.tokens(random_tokens(100, 50 + seed), tenant="z", max_tokens=1)
    poison(runner.cache.blocks, fleet.pool.take_wipes())
    answers.append(fleet.submit(tokens, max_tokens=12))
    fleet.run()
    found = [facts(sequence) for sequence in answers]
    assert found[:2] == [(0, 0), (74, 0)]  # with a copied part of a block
    assert found[2] == (0, 72)
    cold, warm, reloaded = (fleet.results[sequence].token_ids for sequence in answers)
    assert len(set(cold)) > 3
    assert cold == warm == reloaded
    fleet.assert_nothing_held()
    runner.close()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_poison_in_unused_slots_reaches_no_logit(folder: Path, kv_dtype: str) -> None:
    runner = load(folder, kv_dtype=kv_dtype)
    found = []
    for byte in (0xFF, 0):
        runner.cache.blocks.view(torch.uint8).fill_(byte)
        driver = Driver(runner, seed=3)
        found.append(driver.logits(driver.start(random_tokens(61, seed=2)), chunk=17))
    assert found[0].isfinite().all()
    assert torch.equal(*found)
    runner.close()


@pytest.mark.parametrize(("kv_dtype", "allowed"), [("float16", 0.002), ("int8", 0.03), ("fp8", 0.12), ("int4", 0.5)])
def test_logits_are_near(folder: Path, kv_dtype: str, allowed: float) -> None:
    found = []
    for name in ("auto", kv_dtype):
        runner = load(folder, kv_dtype=name)
        driver = Driver(runner)
        found.append(driver.logits(driver.start(random_tokens(90, seed=7)), chunk=40))
        runner.close()
    assert 0 < (found[1] - found[0]).norm() / found[0].norm() < allowed


def test_the_pool_is_sized_by_what_is_kept(folder: Path) -> None:
    config = read_config(folder)
    for kv_dtype in KV_DTYPES:
        cache = kv_cache.allocate(config, 10, 16, dtype=torch.bfloat16, device=torch.device("cpu"), kv_dtype=kv_dtype)
        assert cache.blocks.nbytes == 10 * kv_cache.bytes_per_block(config, 16, torch.bfloat16, kv_dtype)
    sizes = {name: kv_cache.bytes_per_block(config, 16, torch.bfloat16, name) for name in ("auto", *KV_DTYPES)}
    assert sizes["auto"] == sizes["bfloat16"] == sizes["float16"] == sizes["float32"] // 2
    assert sizes["int8"] == sizes["fp8"] == (config.head_dim + 2) * sizes["auto"] // (2 * config.head_dim)
    assert sizes["int4"] == (config.head_dim // 2 + 2) * sizes["auto"] // (2 * config.head_dim)


def test_what_is_kept_differently_is_told_apart(folder: Path) -> None:
    prints, payloads = {}, {}
    for dtype in ("float32", "bfloat16"):
        for kv_dtype in ("auto", *KV_DTYPES):
            runner = load(folder, dtype=dtype, kv_dtype=kv_dtype, cpu_blocks=4)
            assert runner.mover is not None
            prints[dtype, kv_dtype] = runner.spec.fingerprint
            payloads[dtype, kv_dtype] = runner.mover.payload_format
            runner.close()
    for told in (prints, payloads):
        assert told["float32", "auto"] == told["float32", "float32"]
        assert told["bfloat16", "auto"] == told["bfloat16", "bfloat16"]
        assert len(set(told.values())) == 2 * len(KV_DTYPES)


def test_a_payload_of_another_worker_is_read_as_it_was_written(folder: Path) -> None:
    giver, taker = (load(folder, kv_dtype="int8", device_blocks=12, cpu_blocks=4) for _ in range(2))
    assert giver.mover is not None and taker.mover is not None
    assert giver.mover.payload_format == taker.mover.payload_format
    generator = torch.Generator().manual_seed(1)
    giver.cache.blocks[3] = torch.randint(0, 256, giver.cache.blocks[3].shape, generator=generator, dtype=torch.uint8)
    giver.mover._store.rows[2].copy_(giver.cache.blocks[3].view(-1))
    giver.mover._store.sign(2)
    payload = giver.mover.read(2)
    assert payload is not None
    assert len(payload) == giver.cache.blocks[3].nbytes
    assert taker.mover.write(1, payload).result(20)
    assert taker.mover.read(1) == payload
    giver.close()
    taker.close()


@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
def test_kv_is_not_converted_twice(folder: Path, kv_dtype: str) -> None:
    with pytest.raises(ConfigError, match="not beside --kv-dtype"):
        check_settings(WorkerSettings(kv_dtype=kv_dtype, cpu_kv_dtype="int8"))
    with pytest.raises(ConfigError, match="not beside --kv-dtype"):
        load(folder, kv_dtype=kv_dtype, cpu_kv_dtype="int8", cpu_blocks=2)


def test_reuse_changes_no_token_under_load(world: MakeWorld, folder: Path) -> None:
    def play(reuse: bool) -> list[list[int]]:
        runner = load(folder, kv_dtype="int8", device_blocks=40 if reuse else 400)
        poison(runner.cache.blocks)
        fleet = world(runner=runner, max_batch_tokens=48, max_model_len=120, reuse=reuse)
        rng = random.Random(5)
        for _ in range(16):
            tokens = random_tokens(rng.choice((8, 24, 40)), rng.randrange(3)) + random_tokens(5, rng.randrange(4))
            fleet.submit(tokens, max_tokens=4, fork_seeds=(1,) if rng.random() < 0.3 else ())
            fleet.step()
        fleet.run()
        runner.close()
        return [result.token_ids for result in fleet.results.values()]

    assert play(reuse=True) == play(reuse=False)
