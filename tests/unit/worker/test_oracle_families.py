"""Every family against transformers in float32: the same logits and greedy tokens however the work is cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.oracle import FAMILIES, make_checkpoint, oracle_logits
from tests.runner_driver import Driver, load, random_tokens
from worker.batch import Batch, BlockCopy
from worker.model_runner import ModelRunner

TOLERANCE = 1e-4
PROMPT = random_tokens(67, seed=1)
STEPS = 64


@dataclass(frozen=True)
class Family:
    name: str
    folder: Path
    oracle: PreTrainedModel
    runner: ModelRunner
    greedy: list[int]  # of PROMPT, alone and in one chunk

    def driver(self, seed: int = 0) -> Driver:
        return Driver(self.runner, seed)


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = make_checkpoint(folder, request.param)
    runner = load(folder)
    driver = Driver(runner)
    greedy = driver.generate([driver.start(PROMPT)], STEPS)[0]
    return Family(request.param, folder, oracle, runner, greedy)


def test_logits_of_a_prompt(family: Family) -> None:
    driver = family.driver(3)
    ours = driver.logits(driver.start(PROMPT))
    torch.testing.assert_close(ours, oracle_logits(family.oracle, PROMPT), atol=TOLERANCE, rtol=0)


def test_greedy_tokens(family: Family) -> None:
    logits = oracle_logits(family.oracle, PROMPT + family.greedy)[len(PROMPT) - 1 : -1]
    assert logits.argmax(-1).tolist() == family.greedy
    best = logits.topk(2, dim=-1).values
    assert (best[:, 0] - best[:, 1]).min() > 5 * TOLERANCE, "a tie would make this test say nothing"
    assert len(set(family.greedy)) > 8


@pytest.mark.parametrize("chunk", [1, 7, 8, 32])
def test_logits_in_chunks(family: Family, chunk: int) -> None:
    driver = family.driver(chunk)
    ours = driver.logits(driver.start(PROMPT), chunk)
    torch.testing.assert_close(ours, oracle_logits(family.oracle, PROMPT), atol=TOLERANCE, rtol=0)


def test_chunked_prompt_gives_the_same_tokens(family: Family) -> None:
    driver = family.driver(5)
    assert driver.generate([driver.start(PROMPT)], STEPS, chunk=11)[0] == family.greedy


def test_in_a_batch_with_others(family: Family) -> None:
    driver = family.driver(6)
    mine = driver.start(PROMPT)
    others = [driver.start(random_tokens(length, seed=length)) for length in (1, 2, 9, 40, 130)]
    driver.step(others[:3])  # some decode while others prefill
    tokens = driver.generate([*others[:2], mine, *others[2:]], STEPS, chunk=33)
    assert tokens[2] == family.greedy
    logits = oracle_logits(family.oracle, others[4].tokens)[129:-1]
    assert logits.argmax(-1).tolist() == tokens[5]


def test_after_a_prefix_hit(family: Family) -> None:
    driver = family.driver(7)
    first = driver.start(PROMPT[:40] + random_tokens(30, seed=8))
    driver.generate([first], 4)
    hit = driver.start(PROMPT, prefix=first, cached=40)
    assert driver.generate([hit, first], STEPS)[0] == family.greedy


def test_hit_on_all_but_one_token(family: Family) -> None:
    driver = family.driver(8)
    first = driver.start(PROMPT[:65])
    driver.generate([first], 1)
    hit = driver.start(PROMPT[:65], prefix=first, cached=64)
    assert driver.generate([hit], 1)[0] == [first.tokens[-1]]


def test_after_preemption(family: Family) -> None:
    driver = family.driver(9)
    mine, other = driver.start(PROMPT), driver.start(random_tokens(50, seed=10))
    driver.generate([mine, other], 20)
    driver.preempt(mine)
    driver.generate([other], 9)  # takes blocks that were mine
    driver.generate([mine, other], STEPS - 20, chunk=24)
    assert mine.tokens[len(PROMPT) :] == family.greedy


def test_after_a_block_was_copied(family: Family) -> None:
    driver = family.driver(11)
    mine = driver.start(PROMPT)
    driver.generate([mine], 1)
    source, target = mine.blocks[-1], driver.free.pop()
    fork = driver.start(mine.tokens)
    fork.computed, fork.blocks = mine.computed, [*mine.blocks[:-1], target]
    shares = (driver.share(fork), driver.share(mine))
    sampled = driver.runner.execute(Batch(shares, copies=(BlockCopy(source, target, mine.computed % 8),)))
    assert sampled == [family.greedy[1]] * 2


def test_garbage_in_unused_positions_changes_nothing(family: Family) -> None:
    runner = load(family.folder)
    runner.cache.blocks.fill_(float("nan"))
    driver = Driver(runner, 12)
    mine, other = driver.start(PROMPT), driver.start(random_tokens(90, seed=13))
    assert driver.generate([other, mine], STEPS, chunk=40)[1] == family.greedy
    runner.close()
