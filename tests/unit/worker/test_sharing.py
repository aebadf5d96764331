"""What sequences share: parts of blocks by copy, a prefill that many wait for. Computed tokens are counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.scope import Region, ScopeRoot
from worker.sequence import Finish

MakeWorld = Callable[..., Any]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def alone(world: MakeWorld, tokens: list[int], max_tokens: int = 8, **how: Any) -> list[int]:
    """What a worker with room to spare and no cache answers."""
    answer: list[int] = world(num_blocks=1024, max_batch_tokens=512, max_model_len=4096, reuse=False).tokens(
        tokens, max_tokens=max_tokens, **how
    )
    return answer


def computed(fleet: Any) -> int:
    return sum(batch.num_tokens for batch in fleet.batches)


def facts(fleet: Any, sequence: int) -> Any:
    return fleet.results[sequence].outputs[0].admission


# Parts of blocks


@pytest.mark.parametrize("common", range(29, 40))
def test_reuse_is_the_longest_common_prefix(world: MakeWorld, common: int) -> None:
    fleet = world()
    tokens = prompt(40)
    fleet.tokens(tokens)
    other = tokens[:common] + [token + 1 if token < 499 else 3 for token in tokens[common:]]
    before = computed(fleet)
    sequence = fleet.submit(other)
    fleet.run()
    assert fleet.results[sequence].token_ids == alone(world, other)
    assert facts(fleet, sequence).cached_device_tokens == common
    assert facts(fleet, sequence).blocks_copied == (common % 4 > 0)
    assert computed(fleet) - before == 40 - common + 7
    fleet.assert_nothing_held()


def test_a_copy_leaves_its_source_alone(world: MakeWorld) -> None:
    """Two tails from one block, at once and while its first owner still runs."""
    fleet = world()
    tokens = prompt(31)
    first = fleet.submit(tokens, max_tokens=30)
    for _ in range(4):
        fleet.step()
    tails = [[*tokens[:27], 7 + i, 8] for i in range(3)]
    ids = [fleet.submit(tail, max_tokens=12) for tail in tails]
    fleet.run()
    assert fleet.results[first].token_ids == alone(world, tokens, 30)
    assert [fleet.results[i].token_ids for i in ids] == [alone(world, tail, 12) for tail in tails]
    assert [facts(fleet, i).blocks_copied for i in ids] == [1, 1, 1]


def test_no_part_of_a_block_crosses_a_scope(world: MakeWorld) -> None:
    """A published head that ends inside a block: its tokens are shared, the tail behind it is not."""
    fleet = world()
    public, owner, other = (ScopeRoot(name * 16) for name in (b"p", b"o", b"x"))
    head, tail = prompt(18), prompt(14, seed=1)
    fleet.tokens(head + tail, regions=(Region(public, None),))
    for root in (owner, other):
        sequence = fleet.submit(head + tail, regions=(Region(public, 18), Region(root, None)))
        fleet.run()
        assert facts(fleet, sequence).cached_device_tokens == facts(fleet, sequence).cached_published_tokens == 18
        assert fleet.results[sequence].token_ids == alone(world, head + tail)


def test_a_sequence_that_ends_with_a_copy_to_do_gives_everything_back(world: MakeWorld) -> None:
    fleet = world(max_batch_tokens=8)
    fleet.tokens(prompt(32))
    busy = fleet.submit(prompt(40, seed=1), max_tokens=20)
    fleet.step()
    waiting = fleet.submit(prompt(30))
    fleet.cancel(waiting)
    later = fleet.submit(prompt(30))
    batch = fleet.scheduler.schedule(0.0)
    while not batch.copies:
        fleet.scheduler.complete(batch, fleet.runner.execute(batch))
        batch = fleet.scheduler.schedule(0.0)
    fleet.scheduler.fail(batch, "RUNNER_ERROR")
    fleet.run()
    assert {fleet.results[i].finish for i in (busy, later)} == {Finish.ERROR}
    fleet.assert_nothing_held()


# Single flight


def many(world: MakeWorld, **changes: Any) -> Any:
    shape = {"num_blocks": 1024, "block_size": 16, "max_batch_tokens": 512, "max_sequences": 64, "max_model_len": 4096}
    return world(**(shape | changes))


def test_64_identical_cold_prompts_cost_one_prefill(world: MakeWorld) -> None:
    fleet = many(world)
    tokens = prompt(2048)
    ids = [fleet.submit(tokens, max_tokens=1) for _ in range(64)]
    fleet.run()
    assert computed(fleet) <= 1.05 * 2048 + 64
    assert computed(fleet) == 2048 + 63
    assert {tuple(fleet.results[i].token_ids) for i in ids} == {tuple(alone(world, tokens, 1))}
    assert [facts(fleet, i).cached_device_tokens for i in ids] == [0] + [2047] * 63
    fleet.assert_nothing_held()


def test_who_waits_lets_others_pass_and_holds_nothing(world: MakeWorld) -> None:
    fleet = many(world, max_batch_tokens=1000)
    leader = fleet.submit(prompt(640), max_tokens=1)
    for _ in range(3):
        fleet.submit(prompt(640), max_tokens=1)
    other = fleet.submit(prompt(30, seed=1), max_tokens=1)
    batch = fleet.scheduler.schedule(0.0)
    assert [share.sequence_id for share in batch.sequences] == [leader, other]
    assert fleet.pool.num_referenced == 40 + 2
    assert fleet.scheduler.num_queued_tokens == 639 + 29
    fleet.scheduler.complete(batch, fleet.runner.execute(batch))
    fleet.run()
    assert computed(fleet) == 3
    fleet.assert_nothing_held()


def test_a_shared_head_is_computed_once_and_tails_apart(world: MakeWorld) -> None:
    fleet = many(world, max_batch_tokens=128)
    head = prompt(600)
    ids = [fleet.submit(head + prompt(20, seed=i + 1), max_tokens=2) for i in range(8)]
    fleet.run()
    assert computed(fleet) <= 600 + 8 * (20 + 16 + 1)
    assert [fleet.results[i].token_ids for i in ids] == [
        alone(world, head + prompt(20, seed=i + 1), 2) for i in range(8)
    ]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("end", ["cancel", "fail", "preempt"])
def test_a_leader_that_ends_hands_over(world: MakeWorld, end: str, steps: int) -> None:
    fleet = many(world, max_batch_tokens=128)
    leader, *twins = (fleet.submit(prompt(1000), max_tokens=3) for _ in range(4))
    for _ in range(steps):
        fleet.step()
    match end:
        case "cancel":
            fleet.cancel(leader)
        case "fail":
            fleet.scheduler.fail(fleet.scheduler.schedule(fleet.now), "RUNNER_ERROR")
        case "preempt":
            fleet.scheduler._preempt(fleet.scheduler._running[-1])
    fleet.run()
    assert {tuple(fleet.results[i].token_ids) for i in twins} == {tuple(alone(world, prompt(1000), 3))}
    assert computed(fleet) <= 1000 + 4 * (16 + 3) + 128
    fleet.assert_nothing_held()


def test_scopes_do_not_wait_for_each_other(world: MakeWorld) -> None:
    fleet = many(world)
    for tenant in "ab":
        fleet.submit(prompt(640), max_tokens=1, tenant=tenant)
    fleet.run()
    assert computed(fleet) == 2 * 640


@pytest.mark.parametrize("end", [2000, 1993])
def test_256_tenants_compute_a_published_head_once_and_see_nothing_else_of_each_other(
    world: MakeWorld, end: int
) -> None:
    """All at once and cold; the tails are equal, so whoever reads over the border computes too little."""
    fleet = many(world, num_blocks=4096, max_waiting=1000)
    public = ScopeRoot(b"public".ljust(16))
    head, tail = prompt(end), prompt(40, seed=1)
    regions = [(Region(public, end), Region(ScopeRoot(bytes([i] * 16)), None)) for i in range(256)]
    ids = [fleet.submit(head + tail, max_tokens=1, regions=one) for one in regions]
    fleet.run()
    assert computed(fleet) == end + 256 * 40
    assert [facts(fleet, i).cached_published_tokens for i in ids] == [0] + [end] * 255
    assert [facts(fleet, i).cached_device_tokens for i in ids] == [0] + [end] * 255
    assert [facts(fleet, i).blocks_copied for i in ids] == [0] + [int(end % 16 > 0)] * 255
    assert len({tuple(fleet.results[i].token_ids) for i in ids}) == 1
    fleet.assert_nothing_held()


# Forks


HOW: dict[str, Any] = {"temperature": 1.0}


def fork_tokens(world: MakeWorld, tokens: list[int], seeds: range, max_tokens: int = 12) -> list[list[int]]:
    return [alone(world, tokens, max_tokens, seed=seed, **HOW) for seed in seeds]


@pytest.mark.parametrize("length", [1, 4, 29, 30, 32])
def test_8_answers_cost_one_prefill_and_their_own_blocks(world: MakeWorld, length: int) -> None:
    fleet = world(num_blocks=128)
    tokens = prompt(length)
    first = fleet.submit(tokens, seed=0, fork_seeds=tuple(range(1, 8)), max_tokens=12, **HOW)
    while not fleet.results[first].outputs:
        fleet.step()
    assert computed(fleet) == length
    fleet.step()
    shared, whole = length // 4, -(-(length + 1) // 4)
    assert fleet.pool.num_referenced == shared + 8 * (whole - shared)
    fleet.run()
    found = [fleet.results[first + i].token_ids for i in range(8)]
    assert found == fork_tokens(world, tokens, range(8))
    assert len(set(map(tuple, found))) == 8
    assert computed(fleet) == length + 8 * 11
    assert [facts(fleet, first + i) is None for i in range(8)] == [False] + [True] * 7
    fleet.assert_nothing_held()


@pytest.mark.parametrize(("num_blocks", "max_sequences"), [(128, 3), (16, 16), (16, 2)])
def test_forks_that_do_not_fit_take_their_turn(world: MakeWorld, num_blocks: int, max_sequences: int) -> None:
    fleet = world(num_blocks=num_blocks, max_sequences=max_sequences)
    first = fleet.submit(prompt(30), seed=0, fork_seeds=tuple(range(1, 8)), max_tokens=12, **HOW)
    fleet.run()
    assert [fleet.results[first + i].token_ids for i in range(8)] == fork_tokens(world, prompt(30), range(8))
    assert max(len(batch.sequences) for batch in fleet.batches) <= max_sequences
    assert sum(fleet.results[first + i].outputs[0].admission is not None for i in range(8)) == 1
    fleet.assert_nothing_held()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("gone", [0, 1])
def test_a_cancelled_one_leaves_the_others_theirs(world: MakeWorld, gone: int, steps: int) -> None:
    fleet = world(max_batch_tokens=12)
    first = fleet.submit(prompt(30), seed=0, fork_seeds=(1, 2), max_tokens=12, deadline=99.0, **HOW)
    for _ in range(steps):
        fleet.step()
    fleet.cancel(first + gone)
    fleet.run()
    wanted = fork_tokens(world, prompt(30), range(3))
    for i in range(3):
        result = fleet.results[first + i]
        assert result.finish is (Finish.CANCELLED if i == gone else Finish.LENGTH)
        assert result.token_ids == wanted[i][: len(result.token_ids)]
        assert i == gone or len(result.token_ids) == 12
    said = [i for i in range(3) if fleet.results[first + i].outputs[0].admission]
    assert len(said) == 1
    fleet.assert_nothing_held()


def test_forks_end_with_a_prompt_that_fails_or_is_refused_or_late(world: MakeWorld) -> None:
    fleet = world(max_batch_tokens=12)
    fleet.submit(prompt(30), fork_seeds=(1, 2))
    fleet.step()
    fleet.scheduler.fail(fleet.scheduler.schedule(0.0), "RUNNER_ERROR")
    fleet.submit(prompt(190), fork_seeds=(1, 2), max_tokens=20)
    fleet.submit(prompt(30, seed=1), fork_seeds=(1, 2), deadline=fleet.now)
    fleet.run()
    finishes = [fleet.results[i].finish for i in range(9)]
    assert finishes == [Finish.ERROR] * 3 + [Finish.REJECTED] * 3 + [Finish.DEADLINE] * 3
    fleet.submit(prompt(30), fork_seeds=(1, 2))
    fleet.scheduler.fail_all("WORKER_STOPPED")
    fleet.run()
    assert all(fleet.results[9 + i].finish is Finish.ERROR for i in range(3))
    fleet.assert_nothing_held()
