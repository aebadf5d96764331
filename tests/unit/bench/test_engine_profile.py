"""The profile of a step: parts that add up, faces that are as they were after, and no need of Ray or Redis."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import kernels
from bench.engine import profile
from bench.engine.alone import one_engine
from bench.engine.checkpoints import SHAPES, write_checkpoint
from bench.engine.profile import ENGINE, PARTS, Timers, measure_profile, timed_faces
from bench.engine.scenario import MultiTenant
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker import sampler
from worker.layers.rotary import RotaryEmbedding
from worker.model_runner import ModelRunner
from worker.models.decoder import Decoder

SMALL = replace(SHAPES["llama-40m"], hidden_size=32, layers=1, heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
                vocab_size=320)  # fmt: skip
SCENARIO = MultiTenant(tenants=2, system_tokens=32, requests=6, unique_tokens=8, output_tokens=6, concurrency=3)

# In a child: what this process has imported would be found in spite of the hook.
WITHOUT = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "redis", "grpc", "aiohttp", "transformers"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Blocked())
import bench.engine.__main__
from bench.engine import alone, facts
from bench.engine.machine import Machine
from pando.settings import WorkerSettings

settings = WorkerSettings(model=sys.argv[1], device="cpu", dtype="float32", threads=1)
alone.PREFILL_TOKENS = 64
machine = Machine("one", 1, "2", "float32", 10.0, 100.0, 0.0)
assert alone.measure_alone(settings, machine, (1, 2)).decode[1].batch == 2
assert [one.length for one in facts.token_times(settings, (16,), say=lambda line: None)] == [16]
print("done")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(folder, SMALL, 0)
    return folder


@pytest.fixture
def settings(model: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    for name, value in {"PREFILL_TOKENS": 64, "CONTEXT": 16, "STEPS": 4, "BATCHES": (1, 4)}.items():
        monkeypatch.setattr(profile, name, value)
    return WorkerSettings(model=str(model), device="cpu", dtype="float32", threads=1, max_batch_tokens=32)


def test_the_parts_of_each_kind_of_step_add_up(settings: WorkerSettings) -> None:
    found = measure_profile(settings, SCENARIO)
    names = ["prefill 64", "decode batch 1", "decode batch 4", "mixed step of the workload"]
    assert [one.name for one in found] == names and [one.steps for one in found[:2]] == [2, 4]
    for one in found:
        assert tuple(one.parts_ms) == PARTS and sum(one.parts_ms.values()) == pytest.approx(one.wall_ms)
        needed = {part: value for part, value in one.parts_ms.items() if part != profile.OTHER_KERNELS}
        assert min(needed.values()) > 0 and one.untimed_ms > 0 and one.steps > 0


def test_faces_are_as_they_were_even_after_a_failure() -> None:
    def faces() -> list[object]:
        classes = [RotaryEmbedding.__call__, Decoder.logits, ModelRunner.execute, sampler.start]
        return [getattr(kernels, name) for name in kernels.__all__] + classes

    before = faces()
    with pytest.raises(RuntimeError), timed_faces(Timers()):
        assert faces() != before
        raise RuntimeError
    assert faces() == before


def test_the_first_face_has_the_time_of_those_it_calls() -> None:
    timers = Timers()
    inner = timers.part("inner", lambda: sum(range(1000)))
    outer = timers.part("outer", inner)
    plain = SimpleNamespace(decoder=SimpleNamespace(stack=None))
    timers.step(lambda runner, batch: (outer(), inner()))(plain, None)
    found = {part: seconds for part, seconds in timers.take(10.0).items() if seconds}
    assert set(found) == {"inner", "outer", profile.RUNNER, ENGINE} and min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(10.0)
    assert timers.take(1.0) == {ENGINE: 1.0}


def test_a_scenario_without_mixed_steps_is_said(settings: WorkerSettings) -> None:
    with pytest.raises(ConfigError, match="no step of this kind"):
        measure_profile(settings, replace(SCENARIO, requests=1, concurrency=1))


def test_a_device_that_works_on_after_a_call_is_refused(settings: WorkerSettings) -> None:
    with pytest.raises(ConfigError, match="of the CPU"):
        measure_profile(replace(settings, device="cuda"), SCENARIO)


def test_an_owner_finds_what_it_computed_and_no_other_does(settings: WorkerSettings) -> None:
    prompt = list(range(300, 320)) * 2
    with one_engine(replace(settings, device_blocks=64), reuse=True) as engine:
        computed = []
        for owner in ("a", "a", "b"):
            engine.submit(prompt, 1, owner=owner)
            computed.append(sum(step.tokens for step in engine.run()))
    assert computed[0] == computed[2] == len(prompt) > computed[1]


def test_a_bare_checkout_needs_neither_ray_nor_redis(model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(model)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
