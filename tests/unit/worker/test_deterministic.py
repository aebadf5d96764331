"""Reuse changes nothing: in deterministic mode tokens and logits are those of a cold start, to the last bit, whatever
the batch, the chunks, the cache, preemption and the CPU tier. Of all families, in native code and in plain torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from kernels import reference
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from tests.oracle import make_checkpoint
from tests.runner_driver import load, random_tokens
from worker import model_runner, sampler
from worker.batch import Batch
from worker.checks import check_settings
from worker.model_runner import ModelRunner

MakeWorld = Callable[..., Any]
PROMPT = random_tokens(75, seed=4)
TOKENS = 12
KINDS = {
    "native": {"dtype": "float32"},
    "plain": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "kv_dtype": "int8"},
    "sinks": {"dtype": "float32", "window": 40, "sinks": 5},
}
MODELS = [
    (family, kind) for family in ("llama3", "mistral", "qwen2", "qwen3") for kind in ("native", "plain", "bfloat16")
]


@dataclass
class Answer:
    tokens: list[int]
    logits: torch.Tensor  # [TOKENS, vocab_size]
    admission: Any


class Recorded:
    """A runner that keeps the logits of every token it draws."""

    def __init__(self, runner: ModelRunner, patch: pytest.MonkeyPatch) -> None:
        self._runner = runner
        self.spec, self.mover, self.cache = runner.spec, runner.mover, runner.cache
        self.rows: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._step: list[torch.Tensor] = []
        patch.setattr(model_runner.sampler, "start", self._start)
        patch.setattr(model_runner.sampler, "is_greedy", lambda draws: not draws)  # else native steps show no logits

    def execute(self, batch: Batch) -> list[int]:
        tokens = self._runner.execute(batch)
        drawn = [sequence.sequence_id for sequence in batch.sequences for _ in sequence.draws]
        for sequence, row in zip(drawn, self._step.pop() if drawn else (), strict=True):
            self.rows[sequence].append(row)
        return tokens

    def close(self) -> None:
        self._runner.close()

    def _start(self, logits: torch.Tensor, draws: list[sampler.Draw]) -> torch.Tensor:
        self._step.append(logits.clone())
        return START(logits, draws)


START = sampler.start


class Model:
    """Makes fleets of one checkpoint in one kind of arithmetic."""

    def __init__(self, folder: Path, kind: str, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._kind, self._patch = folder, kind, patch
        self._made: list[Recorded] = []
        if kind == "plain":
            patch.setattr(kernels, "_cpu_operations", lambda: reference)

    def fleet(self, world: MakeWorld, *, budget: int = 512, deterministic: str = "on", **settings: int) -> Any:
        options = KINDS[self._kind] | {"device_blocks": 400} | settings
        runner = Recorded(load(self._folder, deterministic=deterministic, **options), self._patch)
        self._made.append(runner)
        runner.cache.blocks.view(torch.uint8).fill_(0xFF)
        shape = runner.spec
        return world(runner=runner, max_batch_tokens=budget, max_model_len=200, window=shape.window, sinks=shape.sinks)

    def close(self) -> None:
        for runner in self._made:
            runner.close()


@pytest.fixture(scope="module", params=[*MODELS, ("qwen3", "int8"), ("llama3", "sinks")], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    family, kind = request.param
    folder = tmp_path_factory.mktemp(family)
    make_checkpoint(folder, family)
    with pytest.MonkeyPatch.context() as patch:
        made = Model(folder, kind, patch)
        yield made
        made.close()


def ask(fleet: Any, tokens: list[int] = PROMPT, **how: Any) -> int:
    sequence: int = fleet.submit(tokens, max_tokens=TOKENS, **how)
    return sequence


def answer(fleet: Any, sequence: int) -> Answer:
    fleet.run()
    result = fleet.results[sequence]
    return Answer(result.token_ids, torch.stack(fleet.runner.rows[sequence]), result.outputs[0].admission)


@pytest.fixture(scope="module")
def expected(model: Model, request: pytest.FixtureRequest) -> Answer:
    """Alone, in one chunk, with nothing cached."""
    from tests.unit.worker.conftest import World

    fleet = model.fleet(World)
    found = answer(fleet, ask(fleet))
    assert len(set(found.tokens)) > 3
    return found


def same(found: Answer, expected: Answer) -> bool:
    return found.tokens == expected.tokens and torch.equal(found.logits, expected.logits)


def test_warm(world: MakeWorld, model: Model, expected: Answer) -> None:
    fleet = model.fleet(world)
    answer(fleet, ask(fleet))
    for tokens in (PROMPT, PROMPT[:40] + random_tokens(9, seed=1), PROMPT):
        found = answer(fleet, ask(fleet, tokens))
        assert found.admission.cached_device_tokens >= 40
        assert tokens is not PROMPT or same(found, expected)


def test_in_a_batch_of_16(world: MakeWorld, model: Model, expected: Answer) -> None:
    fleet = model.fleet(world, budget=200)
    others = [random_tokens(length, seed=length) for length in range(2, 142, 10)]
    for tokens in others[:4]:
        ask(fleet, tokens)
    for _ in range(3):
        fleet.step()
    mine = ask(fleet)
    for tokens in others[4:]:
        ask(fleet, tokens)
    again = ask(fleet)  # waits for the other's blocks, and has some of them
    assert same(answer(fleet, mine), expected)
    assert same(answer(fleet, again), expected)
    assert max(len(batch.sequences) for batch in fleet.batches) == 16


@pytest.mark.parametrize("budget", [1, 7, 32, 50])
def test_in_chunks(world: MakeWorld, model: Model, expected: Answer, budget: int) -> None:
    fleet = model.fleet(world, budget=budget)
    assert same(answer(fleet, ask(fleet)), expected)


def test_after_preemption(world: MakeWorld, model: Model, expected: Answer) -> None:
    """What was decoded is computed again as a prompt."""
    fleet = model.fleet(world, device_blocks=21, budget=64)
    for seed in range(7):  # they grow, and it came last
        fleet.submit(random_tokens(6, seed), max_tokens=30, tenant="z")
    mine = ask(fleet, no_store=True)
    found = answer(fleet, mine)
    assert fleet.scheduler.num_preemptions
    shares = [share for batch in fleet.batches for share in batch.sequences if share.sequence_id == mine]
    assert sum(len(share.token_ids) for share in shares) > len(PROMPT) + TOKENS
    assert same(found, expected)


def test_after_reload_from_the_cpu(world: MakeWorld, model: Model, expected: Answer) -> None:
    fleet = model.fleet(world, device_blocks=24, cpu_blocks=160, budget=64)
    fleet.prefill_tokens_per_s = 1.0
    assert same(answer(fleet, ask(fleet)), expected)
    for seed in range(6):  # until nothing of it is left on the device
        fleet.tokens(random_tokens(100, 50 + seed), tenant="z", max_tokens=1)
    found = answer(fleet, ask(fleet))
    assert found.admission.cached_cpu_tokens >= 40
    assert same(found, expected)


def test_without_it_logits_depend_on_the_batch(
    world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would see if the mode did nothing."""
    make_checkpoint(tmp_path, "llama3")
    model = Model(tmp_path, "plain", monkeypatch)
    found = []
    for chunk in (512, 7):
        fleet = model.fleet(world, budget=chunk, deterministic="off")
        found.append(answer(fleet, ask(fleet)))
    assert not torch.equal(found[0].logits, found[1].logits)
    model.close()


def test_kv_of_workers_without_it_is_not_taken(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3")
    prints = []
    for deterministic in ("off", "on"):
        runner = load(tmp_path, deterministic=deterministic)
        prints.append(runner.spec.fingerprint)
        runner.close()
    assert prints[0] != prints[1]


def test_a_cpu_tier_that_rounds_is_refused() -> None:
    with pytest.raises(ConfigError, match="not beside --deterministic"):
        check_settings(WorkerSettings(deterministic="on", cpu_kv_dtype="int8"))
