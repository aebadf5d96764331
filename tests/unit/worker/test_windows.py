"""Windows and sinks: a sequence gives back what it will not read again, so its blocks stay few however long it gets."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from worker.sequence import Finish

MakeWorld = Callable[..., Any]
LONG = 1 << 20


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def alone(world: MakeWorld, tokens: list[int], max_tokens: int, window: int, sinks: int) -> list[int]:
    """With the same window and room for everything."""
    shape = {"num_blocks": 2048, "max_batch_tokens": 512, "max_model_len": LONG, "reuse": False}
    answer: list[int] = world(**shape, window=window, sinks=sinks).tokens(tokens, max_tokens=max_tokens)
    return answer


@pytest.mark.parametrize(("window", "sinks"), [(16, 0), (16, 4), (13, 3), (5, 9), (1, 0)])
def test_no_end_at_constant_memory(world: MakeWorld, window: int, sinks: int) -> None:
    num_blocks = -(-(sinks + 2 * (window + 16 + 4)) // 4)
    fleet = world(num_blocks=num_blocks, max_batch_tokens=16, max_model_len=LONG, window=window, sinks=sinks)
    sequence = fleet.submit(prompt(60), max_tokens=2000)
    held = []
    while fleet.step():
        held.append(fleet.pool.num_referenced)
    result = fleet.results[sequence]
    assert result.finish is Finish.LENGTH
    assert result.token_ids == alone(world, prompt(60), 2000, window, sinks)
    assert fleet.scheduler.num_preemptions == 0
    assert max(held[-1000:]) <= -(-sinks // 4) + window // 4 + 3
    fleet.assert_nothing_held()


def test_a_prompt_longer_than_the_pool(world: MakeWorld) -> None:
    fleet = world(num_blocks=20, max_batch_tokens=8, max_model_len=LONG, window=16, sinks=4)
    assert fleet.tokens(prompt(900), max_tokens=8) == alone(world, prompt(900), 8, 16, 4)
    fleet.assert_nothing_held()


def test_what_a_window_needs_must_fit(world: MakeWorld) -> None:
    fleet = world(num_blocks=10, max_batch_tokens=16, max_model_len=LONG, window=16)
    sequence = fleet.submit(prompt(30), max_tokens=1000)
    assert fleet.results[sequence].outputs[-1].reason == "KV_CAPACITY"
    assert len(fleet.tokens(prompt(20), max_tokens=20)) == 20


def test_a_head_within_the_window_is_shared(world: MakeWorld) -> None:
    fleet = world(num_blocks=128, max_batch_tokens=64, max_model_len=LONG, window=64, sinks=4)
    head = prompt(48)
    fleet.tokens([*head, 5], max_tokens=200)
    second = fleet.submit([*head, 6], max_tokens=200)
    fleet.run()
    assert fleet.results[second].outputs[0].admission.cached_device_tokens == 48
    assert fleet.results[second].token_ids == alone(world, [*head, 6], 200, 64, 4)


@pytest.mark.parametrize("seed", range(4))
def test_many_with_windows_in_a_small_pool(world: MakeWorld, seed: int) -> None:
    rng = random.Random(seed)
    window, sinks = rng.choice(((8, 0), (16, 4), (11, 5)))
    fleet = world(
        num_blocks=40, max_batch_tokens=8, max_model_len=LONG, window=window, sinks=sinks, num_cpu_blocks=seed % 2 * 64
    )
    asked = {}
    for _ in range(60):
        tokens = prompt(rng.randrange(1, 60), seed=rng.randrange(6))
        forks = (1, 2) if rng.random() < 0.2 else ()
        asked[fleet.submit(tokens, max_tokens=rng.randrange(1, 60), fork_seeds=forks)] = tokens
        for _ in range(rng.randrange(10)):
            fleet.step()
    fleet.run()
    for sequence, tokens in asked.items():
        answer = fleet.results[sequence].token_ids
        assert fleet.results[sequence].finish is Finish.LENGTH
        assert answer == alone(world, tokens, len(answer), window, sinks)
    fleet.assert_nothing_held()
