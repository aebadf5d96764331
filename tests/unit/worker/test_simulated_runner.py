"""The simulated runner: its tokens depend on everything before them, its time on its rates, and it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker.batch import Batch, BlockCopy, SamplingParams, ScheduledSequence
from worker.runner import ModelSpec
from worker.simulated_runner import SimulatedRunner, StepCost, load_simulated_runner

MakeSpec = Callable[..., ModelSpec]


@pytest.fixture
def runner(model_spec: MakeSpec) -> SimulatedRunner:
    return SimulatedRunner(model_spec(num_blocks=16), StepCost(0.0, 0.0))


def share(tokens: list[int], blocks: list[int], start: int = 0, **changes: Any) -> ScheduledSequence:
    return ScheduledSequence(1, array("I", tokens), start, blocks, **({"sampling": SamplingParams()} | changes))


def next_token(runner: SimulatedRunner, tokens: list[int], blocks: list[int], **changes: Any) -> int:
    return runner.execute(Batch((share(tokens, blocks, **changes),)))[0]


TOKENS = list(range(10, 20))


def test_the_next_token_depends_on_every_token_before_it(runner: SimulatedRunner) -> None:
    answers = {next_token(runner, [*TOKENS[:i], 99, *TOKENS[i + 1 :]], [0, 1, 2]) for i in range(10)}
    answers.add(next_token(runner, TOKENS, [0, 1, 2]))
    answers.add(next_token(runner, TOKENS[::-1], [0, 1, 2]))
    assert len(answers) >= 11  # one pair in 500 may be equal


def test_it_does_not_depend_on_the_blocks(runner: SimulatedRunner) -> None:
    assert next_token(runner, TOKENS, [0, 1, 2]) == next_token(runner, TOKENS, [9, 4, 7])


def test_chunks_and_shared_blocks_give_the_same_token(runner: SimulatedRunner) -> None:
    whole = next_token(runner, TOKENS, [0, 1, 2])
    assert runner.execute(Batch((share(TOKENS[:3], [5, 6], sampling=None),))) == []
    runner.execute(Batch((share(TOKENS[3:9], [5, 6, 7], start=3, sampling=None),)))
    assert next_token(runner, TOKENS[9:], [5, 6, 7], start=9) == whole
    assert next_token(runner, TOKENS[4:], [5, 11, 12], start=4) == whole


@pytest.mark.parametrize("blocks", [[6, 5, 7], [5, 8, 7], [5, 5, 7]])
def test_a_wrong_block_table_shows(runner: SimulatedRunner, blocks: list[int]) -> None:
    whole = next_token(runner, TOKENS, [5, 6, 7])
    assert next_token(runner, TOKENS[9:], blocks, start=9) != whole


def test_a_block_that_another_sequence_overwrote_shows(runner: SimulatedRunner) -> None:
    whole = next_token(runner, TOKENS, [5, 6, 7])
    next_token(runner, [1, 2, 3], [6])
    assert next_token(runner, TOKENS[9:], [5, 6, 7], start=9) != whole


def test_copies_come_first(runner: SimulatedRunner) -> None:
    whole = next_token(runner, TOKENS, [0, 1, 2])
    batch = Batch((share(TOKENS[8:], [0, 9, 10], start=8),), copies=(BlockCopy(1, 9, 4),))
    assert runner.execute(batch) == [whole]


def test_a_seed_matters_only_with_temperature(runner: SimulatedRunner) -> None:
    def drawn(temperature: float, seed: int) -> int:
        sampling = SamplingParams(temperature=temperature, seed=seed)
        return next_token(runner, TOKENS, [0, 1, 2], sampling=sampling)

    assert drawn(0.0, 1) == drawn(0.0, 2)
    assert drawn(1.0, 1) == drawn(1.0, 1)
    assert len({drawn(1.0, seed) for seed in range(8)}) > 1


def test_neither_special_nor_banned_tokens_are_drawn(model_spec: MakeSpec) -> None:
    spec = ModelSpec("tiny", bytes(16), 8, 100, (2,), 16, 4)
    runner = SimulatedRunner(spec, StepCost(0.0, 0.0), reserved_token_ids=frozenset({0, 1}))
    drawn = {next_token(runner, [3, i, j], [0], banned_token_ids=(7,)) for i in range(8) for j in range(8)}
    assert drawn == {3, 4, 5, 6}
    with pytest.raises(ValueError, match="no token"):
        next_token(runner, [3], [0], banned_token_ids=(3, 4, 5, 6, 7))


def test_time_follows_the_rates(model_spec: MakeSpec) -> None:
    slept: list[float] = []
    runner = SimulatedRunner(model_spec(), StepCost(0.5, 0.01), sleep=slept.append, clock=lambda: 0.0)
    next_token(runner, TOKENS, [0, 1, 2])
    assert slept == [pytest.approx(0.6)]


def make_folder(folder: Path, config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    added = [{"id": 5, "content": "<x>", "special": True}, {"id": 6, "content": "y", "special": False}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    return folder


def test_a_model_folder_gives_vocabulary_length_and_ends(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"vocab_size": 9, "eos_token_id": 2, "max_position_embeddings": 77})
    runner = load_simulated_runner(WorkerSettings(model=str(folder), device_blocks=4, simulated_step_ms=0.0))
    spec = runner.spec
    assert (spec.name, spec.vocab_size, spec.max_model_len, spec.eos_token_ids) == ("m", 9, 77, (2, 3, 4))
    drawn = {next_token(runner, [i, j], [0]) for i in range(9) for j in range(9)}
    assert drawn == {0, 1, 6, 7, 8}


@pytest.mark.parametrize(
    ("model", "max_model_len"),
    [("./nowhere", 0), ("/nowhere", 0), ("a/b", 10**6)],
    ids=["relative", "absolute", "long"],
)
def test_bad_settings_are_one_error(model: str, max_model_len: int) -> None:
    with pytest.raises(ConfigError):
        load_simulated_runner(WorkerSettings(model=model, max_model_len=max_model_len))


def test_the_fingerprint_is_the_same_in_every_process_and_torch_is_not_needed() -> None:
    program = (
        "import sys\n"
        "from pando.settings import WorkerSettings\n"
        "from worker.process import WorkerProcess\n"
        "from worker.simulated_runner import load_simulated_runner\n"
        "settings = WorkerSettings(runner='simulated', model='a/b', device_blocks=16)\n"
        "process = WorkerProcess(settings)\n"
        "process.start()\n"
        "process.stop()\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
        "print(load_simulated_runner(settings).spec.fingerprint.hex())\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    spec = load_simulated_runner(WorkerSettings(model="a/b")).spec
    assert found.stdout.strip() == spec.fingerprint.hex()
    assert len(spec.fingerprint) == 16
