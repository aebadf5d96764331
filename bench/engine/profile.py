"""Where the time of a step goes on the CPU: timers around the faces of the kernels, the sampler, the runner and a step.

Knows faces by name and swaps them within one block; nothing in them knows of it. Invariant: a step's parts add up to
its time, since what no timer has is the engine's own.
"""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any
from unittest import mock

import kernels
from bench.engine.alone import OneEngine, Step, one_engine
from bench.engine.scenario import PREFILL_TOKENS, MultiTenant, make_asks, single_ask
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker import sampler
from worker.layers.rotary import RotaryEmbedding
from worker.model_runner import ModelRunner
from worker.models.decoder import Decoder

CONTEXT = 256
STEPS = 32
REPEATS = 3
BATCHES = (1, 16)

LINEAR, ATTENTION, ROWS = "linear", "attention", "norms, rotary, KV writes, gate"
HEAD, SAMPLING, PLANNING = "logits head", "sampling", "planning"
OTHER_KERNELS, RUNNER, ENGINE = "other kernels", "runner: arrays", "scheduler and engine"
PARTS = (LINEAR, ATTENTION, ROWS, HEAD, SAMPLING, PLANNING, OTHER_KERNELS, RUNNER, ENGINE)

# What native code says of its time, in order.
_NATIVE = (LINEAR, ATTENTION, ROWS, HEAD, SAMPLING, PLANNING)
_KERNELS = {
    "linear": LINEAR,
    "gated_linear": LINEAR,
    "attention": ATTENTION,
    "sink_attention": ATTENTION,
    "plan_attention": PLANNING,
    **dict.fromkeys(
        ("rms_norm", "add_rms_norm", "head_rms_norm_", "rotary_", "rotary_write_kv", "write_kv", "silu_mul"), ROWS
    ),
}


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one kind of step: milliseconds of each part a step, of all of it, and of all of it without timers. `steps`
    is how many steps one repeat has."""

    name: str
    steps: int
    parts_ms: dict[str, float]
    wall_ms: float
    untimed_ms: float


class Timers:
    """Seconds by part since the last `take`. The first face that is called has the time of those it calls; the runner's
    is what is left of it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._within = False

    def part(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` with a timer."""

        @wraps(run)
        def timed(*args: Any, **options: Any) -> Any:
            if self._within:
                return run(*args, **options)
            self._within = True
            began = time.perf_counter()
            try:
                return run(*args, **options)
            finally:
                self._seconds[name] += time.perf_counter() - began
                self._within = False

        return timed

    def step(self, run: Callable[[ModelRunner, Any], Any]) -> Callable[[ModelRunner, Any], Any]:
        """`ModelRunner.execute` with a timer that leaves out the parts within, and native code's own times."""

        @wraps(run)
        def timed(runner: ModelRunner, batch: Any) -> Any:
            before = sum(self._seconds.values())
            stack = runner.decoder.stack
            spent = (ctypes.c_int64 * len(_NATIVE))()
            if stack is not None:
                stack.spent_ns = spent
            began = time.perf_counter()
            try:
                return run(runner, batch)
            finally:
                for part, nanoseconds in zip(_NATIVE, spent, strict=True):
                    self._seconds[part] += nanoseconds / 1e9
                self._seconds[RUNNER] += time.perf_counter() - began - (sum(self._seconds.values()) - before)
                if stack is not None:
                    stack.spent_ns = None

        return timed

    def take(self, wall_s: float) -> dict[str, float]:
        """Of a step that took so long."""
        found = dict(self._seconds)
        self._seconds.clear()
        return found | {ENGINE: wall_s - sum(found.values())}


@contextmanager
def timed_faces(timers: Timers) -> Iterator[None]:
    """Within, every face has its timer."""
    faces: list[tuple[Any, str, str]] = [
        (kernels, name, _KERNELS.get(name, OTHER_KERNELS))
        for name in kernels.__all__
        if callable(getattr(kernels, name)) and not isinstance(getattr(kernels, name), type) and name != "run_layers"
    ]
    faces += [(RotaryEmbedding, "__call__", ROWS), (Decoder, "logits", HEAD), (sampler, "start", SAMPLING)]
    with ExitStack() as parts:
        for owner, name, part in faces:
            parts.enter_context(mock.patch.object(owner, name, timers.part(part, getattr(owner, name))))
        parts.enter_context(mock.patch.object(ModelRunner, "execute", timers.step(ModelRunner.execute)))
        yield


def measure_profile(settings: WorkerSettings, scenario: MultiTenant) -> list[Profile]:
    """Of a prompt of 4,096 tokens, of decoding and of the workload's mixed steps. `ConfigError` off the CPU."""
    if settings.device != "cpu":
        raise ConfigError("a profile is of the CPU: elsewhere a kernel runs on after its call has returned")
    most = max(*BATCHES, scenario.concurrency)
    length = max(scenario.prompt_tokens + scenario.output_tokens, CONTEXT + STEPS)
    room = max(most * (length + 2 * settings.block_size), PREFILL_TOKENS + 64)
    own = replace(settings, device_blocks=2 * (room // settings.block_size), max_sequences=most)
    with one_engine(own) as engine:
        found = [_profile(engine, f"prefill {PREFILL_TOKENS:,}", _prefill)]
        found += [_profile(engine, f"decode batch {batch}", _decode(batch)) for batch in BATCHES]
    with one_engine(own, reuse=True) as engine:
        return [*found, _profile(engine, "mixed step of the workload", _mixed(scenario))]


Run = Callable[[OneEngine, int], Iterator[tuple[Step, bool]]]
"""Steps of a repeat, and whether each counts."""


def _profile(engine: OneEngine, name: str, run: Run) -> Profile:
    """The repeats with and without timers take turns; each kind's median by time is kept."""
    timed, untimed = [], []
    for number in range(REPEATS):
        untimed.append(_repeat(engine, run, 2 * number, None))
        timers = Timers()
        with timed_faces(timers):
            timed.append(_repeat(engine, run, 2 * number + 1, timers))
    plain = _middle(untimed)
    kept = _middle(timed)
    parts = {part: 1e3 * kept.parts[part] / kept.steps for part in PARTS}
    return Profile(name, kept.steps, parts, 1e3 * kept.wall_s / kept.steps, 1e3 * plain.wall_s / plain.steps)


@dataclass(frozen=True, slots=True)
class _Repeat:
    wall_s: float
    steps: int
    parts: dict[str, float]


def _repeat(engine: OneEngine, run: Run, number: int, timers: Timers | None) -> _Repeat:
    wall_s, steps = 0.0, 0
    parts = dict.fromkeys(PARTS, 0.0)
    for step, counts in run(engine, number):
        seconds = {} if timers is None else timers.take(step.wall_s)
        if counts:
            wall_s, steps = wall_s + step.wall_s, steps + 1
            parts |= {name: parts[name] + value for name, value in seconds.items()}
    if not steps:
        raise ConfigError("the scenario has no step of this kind")
    return _Repeat(wall_s, steps, parts)


def _middle(repeats: Sequence[_Repeat]) -> _Repeat:
    return sorted(repeats, key=lambda one: one.wall_s / one.steps)[len(repeats) // 2]


def _prefill(engine: OneEngine, number: int) -> Iterator[tuple[Step, bool]]:
    engine.submit(single_ask("profile", PREFILL_TOKENS, 1, engine.runner.spec.vocab_size, number).token_ids, 1)
    for step in engine.run():
        yield step, True


def _decode(batch: int) -> Run:
    def run(engine: OneEngine, number: int) -> Iterator[tuple[Step, bool]]:
        for index in range(batch):
            ask = single_ask(f"profile {index}", CONTEXT, STEPS + 1, engine.runner.spec.vocab_size, number)
            engine.submit(ask.token_ids, ask.output_tokens)
        for step in engine.run():
            yield step, step.decoding == step.sequences == batch

    return run


def _mixed(scenario: MultiTenant) -> Run:
    """So many open at once, as in the workload, of which the first part is enough; the steps where some decode and a
    prompt is computed too."""
    part = replace(scenario, requests=min(scenario.requests, 2 * scenario.concurrency))

    def run(engine: OneEngine, number: int) -> Iterator[tuple[Step, bool]]:
        waiting = iter(make_asks(part, engine.runner.spec.vocab_size, number))

        def fill() -> None:
            while engine.num_open < scenario.concurrency and (ask := next(waiting, None)) is not None:
                engine.submit(ask.token_ids, ask.output_tokens, owner=ask.tenant)

        fill()
        for step in engine.run():
            yield step, 0 < step.decoding < step.sequences
            fill()

    return run
