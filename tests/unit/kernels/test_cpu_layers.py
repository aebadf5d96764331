"""A step's layers in one native call against the same layers operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from pando.settings import WorkerSettings
from tests.oracle import FAMILIES, make_checkpoint
from worker.model_runner import ModelRunner, load_model_runner

CONTEXTS = ((40, 40), (1, 17), (5, 23))  # tokens computed, of a context of so many: three sequences


@pytest.fixture(params=sorted(FAMILIES))
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelRunner]:
    make_checkpoint(tmp_path, request.param)
    runner = load_model_runner(WorkerSettings(model=str(tmp_path), device="cpu", device_blocks=40, block_size=8))
    yield runner
    runner.close()
    kernels.set_num_threads(0)


def test_one_call_gives_what_single_operations_give(runner: ModelRunner) -> None:
    whole, step = hidden(runner, wanted=None)
    assert runner.decoder.stack is not None
    kv = runner.cache.blocks.clone()
    single, _ = hidden(runner, wanted=None, stacked=False)
    torch.testing.assert_close(whole, single, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kv, runner.cache.blocks, atol=1e-4, rtol=1e-4)
    assert len(whole) == step


@pytest.mark.parametrize("wanted", [(0, 1, 2), (2,), ()])
@pytest.mark.parametrize("stacked", [True, False])
def test_the_rows_wanted_are_those_of_the_whole(runner: ModelRunner, wanted: tuple[int, ...], stacked: bool) -> None:
    whole, _ = hidden(runner, wanted=None, stacked=stacked)
    kv = runner.cache.blocks.clone()
    rows, _ = hidden(runner, wanted=wanted, stacked=stacked)
    ends = np.cumsum([count for count, _ in CONTEXTS]) - 1
    assert torch.equal(rows, whole[ends[list(wanted)]])
    assert torch.equal(kv, runner.cache.blocks)


def hidden(runner: ModelRunner, *, wanted: tuple[int, ...] | None, stacked: bool = True) -> tuple[torch.Tensor, int]:
    """The step of CONTEXTS over a cache of zeros, and its number of tokens."""
    runner.cache.blocks.zero_()
    decoder = runner.decoder if stacked else replace(runner.decoder, stack=None)
    counts, lengths = (np.array(numbers) for numbers in zip(*CONTEXTS, strict=True))
    tables = np.arange(18).reshape(3, 6)
    positions = np.concatenate([np.arange(length - count, length) for count, length in CONTEXTS])
    ids = torch.from_numpy(positions * 31 % 997)
    kind = {"num_heads": decoder.config.num_heads, "windows": decoder.config.windows}
    plan = kernels.plan_attention(runner.cache.whole, counts, lengths, tables, **kind)
    last = None
    if wanted is not None:
        index = list(wanted)
        ones = np.ones(len(index), dtype=np.int64)
        of_last = None
        if index:
            of_last = kernels.plan_attention(runner.cache.whole, ones, lengths[index], tables[index], **kind)
        last = kernels.LastRows(torch.from_numpy((np.cumsum(counts) - 1)[index]), of_last)
    with torch.inference_mode():
        return decoder.hidden(ids, torch.from_numpy(positions), runner.cache.layers, plan, last), len(ids)


@pytest.mark.parametrize("token_id", [-1, 1 << 40])
def test_an_id_that_is_not_in_the_vocabulary_is_refused(runner: ModelRunner, token_id: int) -> None:
    plan = kernels.plan_attention(
        runner.cache.whole, [1], [1], np.array([[0]]), num_heads=runner.decoder.config.num_heads
    )
    with pytest.raises(IndexError):
        runner.decoder.hidden(torch.tensor([token_id]), torch.tensor([0]), runner.cache.layers, plan)
