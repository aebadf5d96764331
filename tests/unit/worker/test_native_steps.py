"""Whole steps in native code against the logits of the same step, and what they leave to the plain path."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from pando.settings import WorkerSettings
from tests.oracle import FAMILIES, make_checkpoint
from worker.batch import Batch, SamplingParams, ScheduledSequence
from worker.model_runner import ModelRunner, load_model_runner
from worker.native_steps import NativeSteps, native_steps
from worker.step_inputs import step_inputs

GREEDY = SamplingParams()
SIZE = 8


@pytest.fixture(
    params=[(family, dtype) for family in sorted(FAMILIES) for dtype in ("float32", "bfloat16")], ids="-".join
)
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelRunner]:
    family, dtype = request.param
    make_checkpoint(tmp_path, family)
    settings = WorkerSettings(model=str(tmp_path), device="cpu", dtype=dtype, device_blocks=60, block_size=SIZE)
    loaded = load_model_runner(settings)
    yield loaded
    loaded.close()
    kernels.set_num_threads(0)


def batch(vocab_size: int, **first: object) -> Batch:
    """A prompt's end, one that decodes, a prompt's middle, one that decodes over the second's blocks."""
    shared = (10, 11, 12)
    shares = []
    for number, (start, count, blocks) in enumerate(
        ((4, 21, (0, 1, 2, 3)), (30, 1, (*shared, 13)), (0, 17, (20, 21, 22)), (28, 1, (*shared, 14)))
    ):
        tokens = array("I", random.Random(number).choices(range(vocab_size), k=count))
        shares.append(ScheduledSequence(number, tokens, start, blocks, None if number == 2 else GREEDY))
    return Batch((replace(shares[0], **first), *shares[1:]))  # type: ignore[arg-type]


def steps_of(runner: ModelRunner) -> NativeSteps:
    steps = native_steps(runner.decoder, runner.cache)
    assert steps is not None
    runner.cache.blocks.normal_(generator=torch.Generator().manual_seed(0))
    return steps


def last_logits(runner: ModelRunner, step: Batch) -> torch.Tensor:
    ends = torch.tensor([len(share.token_ids) for share in step.sequences]).cumsum(0) - 1
    return runner.logits(step)[ends]


def test_greedy_tokens_are_those_of_the_largest_logits(runner: ModelRunner) -> None:
    steps, step = steps_of(runner), batch(runner.spec.vocab_size)
    before = runner.cache.blocks.clone()
    drawn = steps.run(step_inputs(step, runner.spec))
    written = runner.cache.blocks.clone()
    runner.cache.blocks.copy_(before)
    assert drawn == last_logits(runner, step)[[0, 1, 3]].argmax(1).tolist()
    assert torch.equal(written, runner.cache.blocks)


def test_other_draws_are_those_that_the_sampler_makes_of_the_logits(runner: ModelRunner) -> None:
    hot = SamplingParams(temperature=5.0, seed=7)
    steps, step = steps_of(runner), batch(runner.spec.vocab_size, sampling=hot)
    drawn = steps.run(step_inputs(step, runner.spec))
    logits = last_logits(runner, step)[[0, 1, 3]].contiguous()
    keys = [(hot.seed, 25), (0, 31), (0, 29)]
    ways = [(5.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)]
    assert drawn == kernels.sample(logits, kernels.plan_draws(ways, keys, [], logits.device)).tolist()


def test_forks_draw_from_one_row(runner: ModelRunner) -> None:
    steps = steps_of(runner)
    plain = steps.run(step_inputs(batch(runner.spec.vocab_size), runner.spec))
    forked = batch(runner.spec.vocab_size, fork_sampling=(GREEDY, GREEDY), fork_ids=(8, 9))
    assert steps.run(step_inputs(forked, runner.spec)) == [plain[0]] * 3 + plain[1:]


def test_a_token_may_be_what_the_step_before_drew(runner: ModelRunner) -> None:
    steps = steps_of(runner)
    first = step_inputs(batch(runner.spec.vocab_size), runner.spec)
    drawn = steps.run(first)

    def after(token: int, follows: int | None) -> Batch:
        share = ScheduledSequence(1, array("I", [token]), 31, (10, 11, 12, 13), GREEDY, follows=follows)
        return Batch((share,))

    expected = steps.run(step_inputs(after(drawn[1], None), runner.spec))
    assert steps.run(first) == drawn
    assert steps.run(step_inputs(after(0, 1), runner.spec)) == expected


def test_a_step_that_failed_is_followed_by_nothing(runner: ModelRunner) -> None:
    steps = steps_of(runner)
    share = ScheduledSequence(1, array("I", [3]), 31, (10, 11, 12, 13), GREEDY)
    expected = steps.run(step_inputs(Batch((share,)), runner.spec))
    broken = Batch((replace(share, token_ids=array("I", [2**31])),))
    with pytest.raises(IndexError):
        steps.run(step_inputs(broken, runner.spec))
    assert steps.run(step_inputs(Batch((replace(share, follows=0),)), runner.spec)) == expected


def test_a_hole_is_refused(runner: ModelRunner) -> None:
    share = ScheduledSequence(1, array("I", [3]), 31, (10, -1, 12, 13), GREEDY)
    if runner.decoder.config.windows == (None,) * len(runner.decoder.config.windows):
        with pytest.raises(ValueError, match="hole"):
            steps_of(runner).run(step_inputs(Batch((share,)), runner.spec))


@pytest.mark.parametrize("settings", [{"kv_dtype": "int8"}, {"window": 16, "sinks": 4}], ids=str)
def test_what_native_code_does_not_take_goes_operation_by_operation(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    make_checkpoint(tmp_path, "llama3")
    options = {"model": str(tmp_path), "device": "cpu", "device_blocks": 60, "block_size": SIZE}
    runner = load_model_runner(WorkerSettings(**options | settings))  # type: ignore[arg-type]
    assert native_steps(runner.decoder, runner.cache) is None
    runner.close()


def test_a_table_that_is_too_short_is_refused(runner: ModelRunner) -> None:
    shares = [ScheduledSequence(number, array("I", [3] * 9), 0, (number,), GREEDY) for number in range(2)]
    with pytest.raises(ValueError, match="table"):
        step_inputs(Batch(tuple(shares)), runner.spec)


@pytest.mark.parametrize("wanted", [(1, 0, 3), (0, 1, 4), (-1, 1, 3), (0, 0, 3)], ids=str)
def test_sequences_wanted_are_of_the_step_and_in_order(runner: ModelRunner, wanted: tuple[int, ...]) -> None:
    inputs = step_inputs(batch(runner.spec.vocab_size), runner.spec)
    inputs.step.numbers[8:11] = array("q", wanted)
    with pytest.raises(ValueError, match="sequence"):
        steps_of(runner).run(inputs)
