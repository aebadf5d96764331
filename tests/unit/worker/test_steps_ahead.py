"""Steps decided before the one in front has ended: the same tokens, nobody served later, no block given too early."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot
from worker.batch import Batch
from worker.holdings import OwnerQuota
from worker.sequence import Finish
from worker.simulated_mover import NEVER_WRITTEN

MakeWorld = Callable[..., Any]
PUBLIC = ScopeRoot(b"p" * 16)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def regions(tenant: str, head: int) -> tuple[Region, ...]:
    own = Region(ScopeRoot(tenant.encode().ljust(16, b"-")), None)
    return (Region(PUBLIC, head), own) if head else (own,)


def poisoned(fleet: Any) -> Any:
    """A fleet in which a block that is free when a step is decided holds nothing from then on."""

    def poison() -> None:
        free = [block for block in fleet.pool.take_wipes() if not fleet.pool.references(block)]
        fleet.runner._blocks[free] = NEVER_WRITTEN

    fleet.on_schedule = poison
    return fleet


def ask_at_random(rng: random.Random, fleet: Any) -> dict[int, dict[str, Any]]:
    """Submit one request of any kind; what each of its sequences asked for."""
    head = rng.choice((0, 0, 8, 10, 17))
    tokens = prompt(head, seed=77) + prompt(rng.choice((0, 8, 24)), seed=rng.randrange(3))
    tokens += prompt(rng.randrange(1, 12), seed=rng.randrange(6))
    how: dict[str, Any] = {"max_tokens": rng.randrange(1, 14)}
    if rng.random() < 0.5:
        how |= {"temperature": 1.0, "seed": rng.randrange(3)}
    if rng.random() < 0.4:
        how |= {"stop_token_ids": tuple(range(3, 500, rng.choice((3, 9)))), "min_tokens": rng.randrange(4)}
    seeds = tuple(rng.randrange(9) for _ in range(rng.choice((0, 0, 1, 2)))) if "temperature" in how else ()
    tenant = rng.choice("abc")
    quota = OwnerQuota(Quota(rng.randrange(4))) if rng.random() < 0.2 else None
    ways = {
        "regions": regions(tenant, head),
        "publishers": ((PUBLIC, PUBLIC),),
        "priority": rng.randrange(2),
        "no_store": rng.random() < 0.2,
        "quota": quota,
        "deadline": fleet.now + 0.05 if rng.random() < 0.1 else None,
    }
    first = fleet.submit(tokens, fork_seeds=seeds, **ways, **how)
    made = {first: {"tokens": tokens, **how}}
    for at, seed in enumerate(seeds):
        made[first + 1 + at] = {"tokens": tokens, **how, "seed": seed}
    return made


def work_at_random(fleet: Any, seed: int, operations: int) -> dict[int, dict[str, Any]]:
    """Submits, cancels, purges and steps until all has ended; what each sequence asked for."""
    rng = random.Random(seed)
    asked: dict[int, dict[str, Any]] = {}
    for _ in range(operations):
        action = rng.random()
        if action < 0.3:
            asked |= ask_at_random(rng, fleet)
        elif action < 0.36 and asked:
            fleet.cancel(rng.choice(list(asked)))
        elif action < 0.37:
            owner = ScopeRoot(rng.choice("abc").encode().ljust(16, b"-"))
            fleet.scheduler.cancel_owners({owner})
            fleet._take()
            fleet.holdings.purge([owner])
        else:
            fleet.step()
            fleet.pool.check()
    fleet.run()
    return asked


SHAPES = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(16, 40),
        "max_batch_tokens": st.sampled_from((3, 17, 64)),
        "max_sequences": st.sampled_from((2, 5, 16)),
        "num_cpu_blocks": st.sampled_from((0, 0, 48)),
        "key_bits": st.sampled_from((8, 128)),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**20), shape=SHAPES)
def test_what_is_decided_ahead_shows_in_no_token(world: MakeWorld, seed: int, shape: dict[str, Any]) -> None:
    fleet = poisoned(world(overlap=True, **shape))
    alone: dict[str, list[int]] = {}
    for sequence, how in work_at_random(fleet, seed, 150).items():
        result, key = fleet.results[sequence], repr(sorted(how.items()))
        if key not in alone:
            alone[key] = world(num_blocks=256, max_batch_tokens=512, reuse=False).tokens(how.pop("tokens"), **how)
        assert result.token_ids == alone[key][: len(result.token_ids)]
        if result.finish in (Finish.STOP, Finish.LENGTH):
            assert result.token_ids == alone[key]
        else:
            assert result.finish in (Finish.CANCELLED, Finish.DEADLINE)
    fleet.holdings.expire(fleet.now + 100.0)
    fleet.assert_nothing_held()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**20), window=st.sampled_from((6, 13)), budget=st.sampled_from((3, 17)))
def test_windows_show_in_no_token(world: MakeWorld, seed: int, window: int, budget: int) -> None:
    rng = random.Random(seed)
    shape = {"window": window, "sinks": 3, "max_batch_tokens": budget, "max_model_len": 2000}
    fleet = poisoned(world(overlap=True, num_blocks=64, **shape))
    prompts = [prompt(rng.randrange(1, 60), seed=rng.randrange(3)) for _ in range(12)]
    ids = [fleet.submit(tokens, max_tokens=30) for tokens in prompts]
    fleet.run()
    for sequence, tokens in zip(ids, prompts, strict=True):
        wanted = world(num_blocks=256, reuse=False, **shape).tokens(tokens, max_tokens=30)
        assert fleet.results[sequence].token_ids == wanted
    fleet.assert_nothing_held()


def follows(batches: list[Batch]) -> list[int | None]:
    return [share.follows for batch in batches for share in batch.sequences]


def test_decodes_are_decided_before_their_tokens_are_known(world: MakeWorld) -> None:
    fleet = world(overlap=True)
    ids = [fleet.submit(prompt(9 + i, seed=i), max_tokens=4) for i in range(3)]
    fleet.run()
    assert follows(fleet.batches) == [None] * 3 + [0, 1, 2] * 3
    assert [share.start for batch in fleet.batches for share in batch.sequences][3:6] == [9, 10, 11]
    assert [len(fleet.results[i].token_ids) for i in ids] == [4] * 3
    assert fleet.scheduler.num_discarded_tokens == 0


def test_what_a_stop_makes_vain_is_discarded(world: MakeWorld) -> None:
    tokens = world().tokens(prompt(9), max_tokens=8)
    fleet = world(overlap=True)
    stopped = fleet.submit(prompt(9), max_tokens=8, stop_token_ids=(tokens[2],))
    beside = fleet.submit(prompt(11, seed=1), max_tokens=8)
    fleet.run()
    result = fleet.results[stopped]
    assert (result.finish, result.token_ids) == (Finish.STOP, tokens[: tokens.index(tokens[2]) + 1])
    assert fleet.results[beside].token_ids == world().tokens(prompt(11, seed=1), max_tokens=8)
    assert fleet.scheduler.num_discarded_tokens == 1
    fleet.assert_nothing_held()


def test_a_vain_step_leaves_nothing_in_the_cache(world: MakeWorld) -> None:
    """Nine prompt tokens, a stop behind three: the block of four that the vain step would have filled is not sealed."""
    tokens = world().tokens(prompt(9), max_tokens=8)
    assert tokens[2] not in tokens[:2]
    fleet = world(overlap=True)
    fleet.submit(prompt(9), max_tokens=8, stop_token_ids=(tokens[2],))
    fleet.run()
    assert fleet.pool.num_sealed == len([*prompt(9), *tokens[:2]]) // 4


def test_min_tokens_count_what_is_not_known_yet(world: MakeWorld) -> None:
    how = {"max_tokens": 9, "min_tokens": 5, "stop_token_ids": tuple(range(3, 500, 2))}
    assert world(overlap=True).tokens(prompt(9), **how) == world().tokens(prompt(9), **how)


@pytest.mark.parametrize("steps", range(1, 13))
def test_cancelled_blocks_are_held_until_the_step_has_ended(world: MakeWorld, steps: int) -> None:
    fleet = world(overlap=True, max_batch_tokens=5)
    sequence = fleet.submit(prompt(30), deadline=99.0)
    for _ in range(steps):
        fleet.step()
    (on_its_way,) = fleet._launched or (None,)
    fleet.cancel(sequence)
    assert fleet.results[sequence].finish is Finish.CANCELLED
    assert fleet.scheduler.num_sequences == 0
    said = len(fleet.results[sequence].outputs)
    if on_its_way is not None:
        written = {block for share in on_its_way[0].sequences for block in share.block_ids}
        assert all(fleet.pool.references(block) for block in written)
    fleet.run()
    assert len(fleet.results[sequence].outputs) == said
    fleet.assert_nothing_held()


def first_tokens(fleet: Any, *ids: int) -> list[int]:
    """In which step each sequence computed its last prompt token."""
    at = {}
    for number, batch in enumerate(fleet.batches):
        for share in batch.sequences:
            if share.draws:
                at.setdefault(share.sequence_id, number)
    return [at[i] for i in ids]


def waits_for_a_seat(fleet: Any) -> list[int]:
    return [fleet.submit(prompt(10, seed=i), max_tokens=3 + i) for i in range(5)]


def waits_for_blocks(fleet: Any) -> list[int]:
    return [fleet.submit(prompt(40, seed=i), max_tokens=3 + i) for i in range(4)]


def waits_for_a_prompt(fleet: Any) -> list[int]:
    """Of another one, which is still in the middle of it when they could begin."""
    return [fleet.submit(prompt(40) + prompt(5, seed=i), max_tokens=6) for i in range(3)]


@pytest.mark.parametrize("come", [waits_for_a_seat, waits_for_blocks, waits_for_a_prompt])
def test_who_waits_is_served_in_the_same_step(world: MakeWorld, come: Callable[[Any], list[int]]) -> None:
    steps = []
    for overlap in (False, True):
        fleet = world(overlap=overlap, max_sequences=2, num_blocks=26, max_batch_tokens=42)
        ids = come(fleet)
        fleet.run()
        steps.append(first_tokens(fleet, *ids))
    assert steps[0] == steps[1]


def test_no_step_is_decided_where_forks_go_apart_or_a_published_head_ends(world: MakeWorld) -> None:
    fleet = world(overlap=True, max_batch_tokens=10)
    fleet.submit(prompt(14), regions=regions("a", 10), fork_seeds=(1, 2), temperature=1.0, max_tokens=5)
    fleet.run()
    assert [batch.sequences[0].end for batch in fleet.batches[:2]] == [10, 14]
    assert [share.follows for share in fleet.batches[2].sequences] == [None] * 3
    assert len(fleet.batches[2].copies) == 3
    assert [share.follows for share in fleet.batches[3].sequences] == [0, 1, 2]


def test_nobody_is_preempted_while_a_step_runs(world: MakeWorld) -> None:
    fleet = world(overlap=True, num_blocks=11)
    ids = [fleet.submit(prompt(16, seed=i), max_tokens=20) for i in range(2)]
    before = 0
    while fleet.scheduler.num_sequences:
        fleet.step()
        if fleet.scheduler.num_preemptions > before:
            before = fleet.scheduler.num_preemptions
            assert all(share.follows is None for share in fleet.batches[-1].sequences) or len(fleet._launched)
    assert before > 0
    for i, sequence in enumerate(ids):
        assert fleet.results[sequence].token_ids == world().tokens(prompt(16, seed=i), max_tokens=20)
    fleet.run()
    fleet.assert_nothing_held()


def test_a_step_that_fails_takes_along_what_follows_it(world: MakeWorld) -> None:
    """Who is new in the step behind it goes on."""
    fleet = world(overlap=True)
    hit = fleet.submit(prompt(10), max_tokens=5)
    first = fleet.scheduler.schedule(0.0)
    spared = fleet.submit(prompt(12, seed=1), max_tokens=5)
    second = fleet.scheduler.schedule(0.0)
    assert second is None, "somebody waits, and the first step computes a prompt"
    fleet.scheduler.complete(first, fleet.runner.launch(first).tokens())
    first, second = fleet.scheduler.schedule(0.0), fleet.scheduler.schedule(0.0)
    fleet._take()
    launched = [fleet.runner.launch(batch) for batch in (first, second)]
    late = fleet.submit(prompt(7, seed=2), max_tokens=5)
    fleet.scheduler.fail(first, "RUNNER_ERROR")
    fleet._take()
    assert [fleet.results[i].finish for i in (hit, spared)] == [Finish.ERROR] * 2
    assert fleet.pool.num_referenced > 0
    fleet.scheduler.complete(second, launched[1].tokens())
    assert fleet.pool.num_referenced == 0
    fleet.run()
    assert fleet.results[late].token_ids == world().tokens(prompt(7, seed=2), max_tokens=5)
    assert fleet.scheduler.num_discarded_tokens == 2
    fleet.assert_nothing_held()


def test_the_queue_length_counts_what_is_on_its_way(world: MakeWorld) -> None:
    fleet = world(max_batch_tokens=8)
    fleet.submit(array("I", prompt(30)), max_tokens=2)
    fleet.scheduler.schedule(0.0)
    fleet.scheduler.schedule(0.0)
    assert fleet.scheduler.num_queued_tokens == 29
