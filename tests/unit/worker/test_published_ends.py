"""Published heads that end inside a block: whoever comes first computes all of the head, every other one none of it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot
from worker.holdings import OwnerQuota, PinRequest
from worker.sequence import Finish

MakeWorld = Callable[..., Any]
HEAD = 42
PUBLIC, PUBLISHER = (ScopeRoot(name.ljust(16)) for name in (b"public", b"publisher"))
PUBLISHERS = ((PUBLIC, PUBLISHER),)


def tokens(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def tenant(number: int) -> ScopeRoot:
    return ScopeRoot(bytes([number + 1] * 16))


def regions(number: int, end: int = HEAD) -> tuple[Region, ...]:
    return Region(PUBLIC, end), Region(tenant(number), None)


def prompts(count: int, head: int = HEAD, tail: int = 9) -> list[list[int]]:
    """Tails that begin alike: whoever reads over the border computes too little."""
    return [[*tokens(head), *tokens(3, 1), *tokens(tail - 3, 10 + number)] for number in range(count)]


def alone(world: MakeWorld, prompt: list[int], max_tokens: int = 4) -> list[int]:
    answer: list[int] = world(num_blocks=256, reuse=False).tokens(prompt, max_tokens=max_tokens)
    return answer


def of_the_head(fleet: Any, head: int = HEAD) -> int:
    """Head tokens computed, by all."""
    shares = [(share.start, share.start + len(share.token_ids)) for b in fleet.batches for share in b.sequences]
    return sum(max(0, min(end, head) - start) for start, end in shares)


def facts(fleet: Any, sequence: int) -> Any:
    return fleet.results[sequence].outputs[0].admission


def submit(fleet: Any, number: int, prompt: list[int], end: int = HEAD, **how: Any) -> int:
    made: int = fleet.submit(prompt, regions=regions(number, end), publishers=PUBLISHERS, **({"max_tokens": 4} | how))
    return made


@pytest.mark.parametrize("budget", [7, 10, 20, 41, 42, 43, 64, 512])
@pytest.mark.parametrize("head", [3, 42, 43, 44, 45])
def test_many_cold_at_once_compute_the_head_once(world: MakeWorld, head: int, budget: int) -> None:
    fleet = world(num_blocks=256, max_batch_tokens=budget)
    wanted = prompts(6, head)
    ids = [submit(fleet, number, prompt, head) for number, prompt in enumerate(wanted)]
    fleet.run()
    assert of_the_head(fleet, head) == head
    assert sum(batch.num_tokens for batch in fleet.batches) == head + 6 * (9 + 3)
    assert [fleet.results[i].token_ids for i in ids] == [alone(world, prompt) for prompt in wanted]
    assert [facts(fleet, i).cached_published_tokens for i in ids] == [0] + [head] * 5
    assert [facts(fleet, i).cached_device_tokens for i in ids] == [0] + [head] * 5
    assert [facts(fleet, i).blocks_copied for i in ids] == [0] + [int(head % 4 > 0)] * 5
    fleet.assert_nothing_held()


def test_one_after_the_other_and_then_all_again(world: MakeWorld) -> None:
    fleet = world(num_blocks=256)
    for number, prompt in enumerate(prompts(6)):
        sequence = submit(fleet, number, prompt)
        fleet.run()
        assert facts(fleet, sequence).cached_published_tokens == (HEAD if number else 0)
        assert fleet.results[sequence].token_ids == alone(world, prompt)
    ids = [submit(fleet, 6 + number, prompt) for number, prompt in enumerate(prompts(6))]
    fleet.run()
    assert of_the_head(fleet) == HEAD
    assert [facts(fleet, i).cached_device_tokens for i in ids] == [HEAD] * 6
    assert fleet.pool.account(PUBLISHER).charge == 11  # ten blocks and the end


def test_the_head_alone_as_a_warm_up_computes_it_and_leaves_its_end(world: MakeWorld) -> None:
    fleet = world(num_blocks=256)
    submit(fleet, 9, tokens(HEAD), max_tokens=1, fork_seeds=(5, 6))
    ids = [submit(fleet, number, prompt) for number, prompt in enumerate(prompts(6))]
    fleet.run()
    assert of_the_head(fleet) == HEAD
    assert [facts(fleet, i).cached_published_tokens for i in ids] == [HEAD] * 6
    fleet.assert_nothing_held()


def test_forks_of_the_head_go_on_in_blocks_of_their_own(world: MakeWorld) -> None:
    fleet = world(num_blocks=256)
    first = submit(fleet, 0, tokens(HEAD), seed=0, fork_seeds=(1, 2), temperature=1.0, max_tokens=9)
    fleet.run()
    other = world(num_blocks=256, reuse=False)
    wanted = [other.tokens(tokens(HEAD), seed=seed, temperature=1.0, max_tokens=9) for seed in range(3)]
    assert [fleet.results[first + i].token_ids for i in range(3)] == wanted
    fleet.assert_nothing_held()


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("end", ["cancel", "fail", "preempt"])
def test_a_leader_may_go_at_any_time(world: MakeWorld, end: str, steps: int) -> None:
    fleet = world(num_blocks=256, max_batch_tokens=11)
    wanted = prompts(6)
    ids = [submit(fleet, number, prompt) for number, prompt in enumerate(wanted)]
    for _ in range(steps):
        fleet.step()
    before = of_the_head(fleet)
    lost: list[int] = []
    match end:
        case "cancel":
            fleet.cancel(ids[0])
            lost = [ids[0]]
        case "fail":
            batch = fleet.scheduler.schedule(fleet.now)
            lost = [share.sequence_id for share in batch.sequences]
            fleet.scheduler.fail(batch, "RUNNER_ERROR")
        case "preempt":
            fleet.scheduler._preempt(fleet.scheduler._running[0])
    fleet.run()
    left = [i for i in ids if fleet.results[i].finish is Finish.LENGTH]
    assert set(ids) - set(left) <= set(lost)
    assert [fleet.results[i].token_ids for i in left] == [alone(world, wanted[ids.index(i)]) for i in left]
    assert of_the_head(fleet) <= HEAD + before % 4  # what was computed of the block that its leader took along
    fleet.assert_nothing_held()


def test_a_purge_takes_the_end_along(world: MakeWorld) -> None:
    fleet = world(num_blocks=256)
    wanted = prompts(4)
    submit(fleet, 0, wanted[0])
    fleet.run()
    fleet.holdings.purge([tenant(0)])  # the leader's own: the head is the publisher's
    sequence = submit(fleet, 1, wanted[1])
    fleet.run()
    assert facts(fleet, sequence).cached_published_tokens == HEAD
    running = submit(fleet, 2, wanted[2], max_tokens=20)
    fleet.step()
    count = fleet.holdings.purge([PUBLISHER])
    assert count.device_blocks >= 11
    assert fleet.pool.account(PUBLIC).charge == 10  # which the reader holds; the end is free
    sequence = submit(fleet, 3, wanted[3])
    fleet.run()
    assert facts(fleet, sequence).cached_device_tokens == 0
    assert of_the_head(fleet) == 2 * HEAD
    assert fleet.results[running].token_ids == alone(world, wanted[2], 20)
    assert fleet.results[sequence].token_ids == alone(world, wanted[3])
    fleet.assert_nothing_held()


@pytest.mark.parametrize("num_blocks", [13, 14, 15, 16, 20, 28])
@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("num_cpu_blocks", [0, 16])
def test_in_a_small_pool_every_request_ends_well(
    world: MakeWorld, num_blocks: int, cold: bool, num_cpu_blocks: int
) -> None:
    """A pool that one request fills has no block for the end; it runs as without."""
    fleet = world(num_blocks=num_blocks, num_cpu_blocks=num_cpu_blocks, max_model_len=55, max_batch_tokens=20)
    wanted = prompts(6)
    ids = []
    for number, prompt in enumerate(wanted):
        ids.append(submit(fleet, number, prompt, max_tokens=1 + number % 2))
        if not cold:
            fleet.run()
    fleet.run()
    assert [fleet.results[i].token_ids for i in ids] == [
        alone(world, prompt, 1 + number % 2) for number, prompt in enumerate(wanted)
    ]
    fleet.assert_nothing_held()


def test_a_part_gives_way_where_the_request_fits_without_it(world: MakeWorld) -> None:
    """The source of a copy is one block more than the pool has."""
    fleet = world(num_blocks=3, max_model_len=12)
    fleet.tokens(range(3, 11), max_tokens=1)
    other = [*range(3, 9), 99, 98, 97]
    assert fleet.tokens(other, max_tokens=1) == alone(world, other, 1)
    fleet.assert_nothing_held()


def test_a_window_changes_nothing(world: MakeWorld) -> None:
    fleet = world(num_blocks=256, window=12, sinks=4, max_model_len=400)
    wanted = prompts(4, 42, 30)
    ids = [submit(fleet, number, prompt) for number, prompt in enumerate(wanted)]
    fleet.run()
    calm = world(num_blocks=256, window=12, sinks=4, max_model_len=400, reuse=False)
    assert [fleet.results[i].token_ids for i in ids] == [calm.tokens(prompt, max_tokens=4) for prompt in wanted]
    fleet.assert_nothing_held()


def test_a_pin_holds_the_end_within_its_budget(world: MakeWorld) -> None:
    fleet = world(num_blocks=40, max_model_len=120)
    submit(fleet, 0, prompts(1)[0])
    fleet.run()
    for budget, pinned in ((10, 40), (11, HEAD)):
        quota = OwnerQuota(Quota(pinned=budget))
        pin = PinRequest("x", regions(0), PUBLISHERS, array("I", tokens(HEAD)), 10.0, quota)
        assert fleet.holdings.pin(pin, fleet.now) == pinned
        assert fleet.pool.num_referenced == budget
    for number in range(6):
        fleet.tokens(tokens(80, 100 + number), tenant="z", max_tokens=2)
    sequence = submit(fleet, 1, prompts(2)[1])
    fleet.run()
    assert facts(fleet, sequence).cached_published_tokens == HEAD
    fleet.holdings.expire(fleet.now + 11.0)
    fleet.assert_nothing_held()


def test_the_index_is_not_told_of_ends(world: MakeWorld) -> None:
    fleet = world(num_blocks=256)
    submit(fleet, 0, tokens(HEAD), max_tokens=1)
    fleet.run()
    (stored,) = fleet.pool.take_events()
    assert len(stored.keys) == 10 == len(fleet.pool.sealed_keys()) and fleet.pool.num_sealed == 11
    fleet.holdings.purge([PUBLIC])
    fleet.holdings.purge([PUBLISHER])
    (removed,) = fleet.pool.take_events()
    assert sorted(removed.keys) == sorted(stored.keys) and fleet.pool.num_sealed == 0


def test_collisions_cost_reuse_and_never_an_answer(world: MakeWorld) -> None:
    for bits in (1, 2, 4, 8):
        fleet = world(num_blocks=256, key_bits=bits)
        wanted = prompts(6)
        ids = [submit(fleet, number, prompt) for number, prompt in enumerate(wanted)]
        fleet.run()
        assert [fleet.results[i].token_ids for i in ids] == [alone(world, prompt) for prompt in wanted]
        fleet.assert_nothing_held()
