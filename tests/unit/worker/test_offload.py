"""The CPU tier under the scheduler: what leaves the device comes back by copy, bit for bit or not at all."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from worker.sequence import Finish

MakeWorld = Callable[..., Any]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def alone(world: MakeWorld, tokens: list[int], max_tokens: int = 8) -> list[int]:
    answer: list[int] = world(num_blocks=256, max_batch_tokens=512, reuse=False).tokens(tokens, max_tokens=max_tokens)
    return answer


def computed(fleet: Any) -> int:
    return sum(batch.num_tokens for batch in fleet.batches)


def facts(fleet: Any, sequence: int) -> Any:
    return fleet.results[sequence].outputs[0].admission


def flush(fleet: Any, seed: int = 100) -> None:
    """Fill the device with other prompts until nothing is left of those before."""
    for i in range(6):
        fleet.tokens(prompt(60, seed=seed + i), tenant="z", max_tokens=1)


def test_what_left_the_device_comes_back_by_copy(world: MakeWorld) -> None:
    fleet = world(num_blocks=32, num_cpu_blocks=256)
    tokens = prompt(49)
    fleet.tokens(tokens)
    flush(fleet)
    before = computed(fleet)
    again = fleet.submit([*tokens[:48], 7, 8])
    fleet.run()
    found = facts(fleet, again)
    assert (found.cached_device_tokens, found.cached_cpu_tokens) == (0, 48)
    assert computed(fleet) - before == 2 + 7
    assert fleet.results[again].token_ids == alone(world, [*tokens[:48], 7, 8])
    assert fleet.tiers.counts.promoted == 12
    fleet.assert_nothing_held()


def test_one_load_serves_all_who_wait_for_it(world: MakeWorld) -> None:
    fleet = world(num_blocks=32, num_cpu_blocks=256)
    tokens = prompt(48)
    fleet.tokens(tokens)
    flush(fleet)
    before = computed(fleet)
    ids = [fleet.submit([*tokens, i + 5], max_tokens=1) for i in range(8)]
    fleet.run()
    assert fleet.tiers.counts.promoted == 12
    assert computed(fleet) - before == 8
    assert [fleet.results[i].token_ids for i in ids] == [alone(world, [*tokens, i + 5], 1) for i in range(8)]
    fleet.assert_nothing_held()


def test_others_run_while_one_loads(world: MakeWorld) -> None:
    fleet = world(num_blocks=64, num_cpu_blocks=256)
    tokens = prompt(160)
    fleet.tokens(tokens, max_tokens=1)
    for i in range(8):
        fleet.tokens(prompt(100, seed=50 + i), tenant="z", max_tokens=1)
    loading = fleet.submit([*tokens, 5], max_tokens=1)
    other = fleet.submit(prompt(5, seed=3), tenant="z", max_tokens=1)
    fleet.step()
    assert fleet.results[other].finish is Finish.LENGTH
    assert not fleet.results[loading].outputs
    fleet.run()
    assert facts(fleet, loading).cached_cpu_tokens > 0
    fleet.assert_nothing_held()


def test_a_payload_that_changed_is_computed_again(world: MakeWorld) -> None:
    fleet = world(num_blocks=32, num_cpu_blocks=256)
    tokens = prompt(49)
    fleet.tokens(tokens)
    flush(fleet)
    fleet.runner.mover.blocks[:, 2] ^= 1
    again = fleet.submit(tokens)
    fleet.run()
    assert facts(fleet, again).cached_cpu_tokens == 0
    assert fleet.tiers.counts.corrupt > 0
    assert fleet.results[again].token_ids == alone(world, tokens)
    fleet.assert_nothing_held()


def test_nothing_is_loaded_that_is_cheaper_to_compute(world: MakeWorld) -> None:
    fleet = world(num_blocks=32, num_cpu_blocks=256)
    tokens = prompt(49)
    fleet.tokens(tokens)
    flush(fleet)
    fleet.prefill_tokens_per_s = 1e9
    fleet.submit(tokens)
    fleet.run()
    again = fleet.submit(prompt(60, seed=100), tenant="z", max_tokens=1)
    fleet.run()
    assert fleet.tiers.counts.recomputed > 0
    assert facts(fleet, again).cached_cpu_tokens == 0


@pytest.mark.parametrize(
    ("num_blocks", "num_others", "step_s", "loads"),
    [
        (2, 0, 1.0, True),  # nobody computes: no step goes by, however long one is
        (1, 0, 1.0, False),  # 0.4 ms to compute; to see that it has come takes 0.5 ms
        (1, 1, 0.001, False),  # its own wait for the end of the step is longer than what both would wait
        (1, 1, 0.0005, True),
        (1, 8, 0.001, True),  # nine would wait
        (1, 8, 0.01, False),
        (12, 8, 0.01, True),
    ],
)
def test_a_load_is_weighed_by_whom_it_delays(
    world: MakeWorld, num_blocks: int, num_others: int, step_s: float, loads: bool
) -> None:
    """A token takes 0.1 ms to compute, a block 0.02 ms to load."""
    fleet = world(num_blocks=100, num_cpu_blocks=256)
    tokens = prompt(4 * num_blocks)
    fleet.tokens(tokens, max_tokens=1)
    for i in range(8):
        fleet.tokens(prompt(60, seed=100 + i), tenant="z", max_tokens=1)
    fleet.tokens(prompt(4, seed=99), tenant="z", max_tokens=1)
    measuring = fleet.submit([*prompt(60, seed=100), 9], tenant="z", max_tokens=1)
    fleet.run()
    assert facts(fleet, measuring).cached_cpu_tokens > 0
    others = [fleet.submit(prompt(3, seed=200 + i), tenant="z", max_tokens=12) for i in range(num_others)]
    fleet.step()
    fleet.step_s = step_s
    asked = fleet.submit([*tokens, 5], max_tokens=1)
    fleet.run()
    assert all(len(fleet.results[i].token_ids) == 12 for i in others)
    found = facts(fleet, asked)
    assert (found.cached_device_tokens, found.cached_cpu_tokens) == (0, len(tokens) if loads else 0)
    fleet.assert_nothing_held()


def test_what_is_in_use_is_copied_before_it_is_given_back(world: MakeWorld) -> None:
    """Four fill the device at a time; whoever comes next takes the blocks of those that end, in the same step."""
    fleet = world(num_blocks=32, num_cpu_blocks=256)
    talks = {fleet.submit(prompt(28, seed=i), max_tokens=4): prompt(28, seed=i) for i in range(16)}
    fleet.run()
    flush(fleet)
    again = [fleet.submit([*tokens, 7], max_tokens=1) for tokens in talks.values()]
    fleet.run()
    assert [facts(fleet, i).cached_cpu_tokens for i in again] == [28] * 16
    fleet.assert_nothing_held()


@pytest.mark.parametrize("steps", range(4))
def test_cancel_while_loading_leaves_nothing_held(world: MakeWorld, steps: int) -> None:
    fleet = world(num_blocks=32, num_cpu_blocks=256)
    tokens = prompt(49)
    fleet.tokens(tokens)
    flush(fleet)
    gone = fleet.submit(tokens)
    stays = fleet.submit(tokens)
    for _ in range(steps):
        fleet.step()
    fleet.cancel(gone)
    fleet.run()
    assert fleet.results[stays].token_ids == alone(world, tokens)
    fleet.assert_nothing_held()


def test_a_purge_reaches_both_tiers(world: MakeWorld) -> None:
    fleet = world(num_blocks=32, num_cpu_blocks=256)
    request = fleet.submit(prompt(48), max_tokens=1)
    root = fleet.scheduler._sequences[request].request.owner
    fleet.run()
    flush(fleet)
    count = fleet.holdings.purge([root])
    assert count.cpu_blocks == 12
    assert fleet.tiers.cpu.num_sealed > 0
    again = fleet.submit(prompt(48), max_tokens=1)
    fleet.run()
    assert facts(fleet, again).cached_device_tokens + facts(fleet, again).cached_cpu_tokens == 0


def test_turns_of_many_talks_cost_half_of_what_they_cost_without(world: MakeWorld) -> None:
    """The set is three times the device pool."""

    def play(num_cpu_blocks: int) -> tuple[int, list[list[int]]]:
        fleet = world(num_blocks=96, num_cpu_blocks=num_cpu_blocks, max_batch_tokens=128)
        talks = [prompt(60, seed=i) for i in range(12)]
        answers = []
        for turn in range(4):
            for i, talk in enumerate(talks):
                answer = fleet.tokens(talk, max_tokens=6)
                answers.append(answer)
                talks[i] = [*talk, *answer, *prompt(8, seed=100 * turn + i)]
        fleet.assert_nothing_held()
        return computed(fleet), answers

    without, wanted = play(0)
    with_tier, answers = play(1024)
    assert answers == wanted
    assert without >= 2 * with_tier


def test_50_requests_over_one_long_head_are_not_slower_and_start_sooner(world: MakeWorld) -> None:
    """Twice, with another long prompt between that drives the head out: time is the simulated device's."""

    def play(num_cpu_blocks: int) -> tuple[float, float]:
        fleet = world(
            num_blocks=700, block_size=16, max_batch_tokens=512, max_sequences=64, max_model_len=20_000,
            num_cpu_blocks=num_cpu_blocks,
        )  # fmt: skip
        head, first_tokens, busy = prompt(10_000), [], 0.0
        for turn in range(2):
            began = fleet.now
            left = {fleet.submit(head + prompt(200, seed=i + 1), max_tokens=32) for i in range(50)}
            while fleet.scheduler.num_sequences:
                fleet.step()
                started = {i for i in left if fleet.results[i].outputs}
                first_tokens += [fleet.now - began] * len(started)
                left -= started
            busy += fleet.now - began
            fleet.run()
            fleet.tokens(prompt(9_000, seed=999 + turn), tenant="z", max_tokens=4)
        return busy, sorted(first_tokens)[50]

    (without, late), (with_tier, soon) = play(0), play(4096)
    assert with_tier <= without
    assert soon < late


@pytest.mark.parametrize("seed", range(8))
def test_random_work_over_both_tiers_shows_in_no_token(world: MakeWorld, seed: int) -> None:
    rng = random.Random(seed)
    fleet = world(
        num_blocks=rng.choice((20, 28)),
        num_cpu_blocks=rng.choice((8, 40, 200)),
        max_batch_tokens=rng.choice((7, 32)),
        max_sequences=rng.choice((2, 16)),
        key_bits=rng.choice((8, 128)),
    )
    asked: dict[int, list[int]] = {}
    for _ in range(150):
        head = prompt(rng.choice((0, 8, 24, 40)), seed=rng.randrange(4))
        tokens = head + prompt(rng.randrange(1, 14), seed=rng.randrange(5))
        forks = (1,) if rng.random() < 0.1 else ()
        asked[fleet.submit(tokens, max_tokens=rng.randrange(1, 10), tenant=rng.choice("ab"), fork_seeds=forks)] = tokens
        for _ in range(rng.randrange(5)):
            fleet.step()
        if rng.random() < 0.1:
            fleet.cancel(rng.choice(list(asked)))
        fleet.tiers.check(deep=True)
    fleet.run()
    whole: dict[tuple[int, ...], list[int]] = {}
    for sequence, tokens in asked.items():
        answer = fleet.results[sequence].token_ids
        wanted = whole.setdefault(tuple(tokens), alone(world, tokens, 10))
        assert answer == wanted[: len(answer)]
        assert fleet.results[sequence].finish in (Finish.LENGTH, Finish.CANCELLED)
    fleet.assert_nothing_held()
