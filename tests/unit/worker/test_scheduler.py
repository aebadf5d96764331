"""What a step computes: batches, chunks, prefix hits, preemption, refusals, ends. Any slip shows as another token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.scope import Region, ScopeRoot
from worker.sequence import Finish

MakeWorld = Callable[..., Any]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def alone(world: MakeWorld, tokens: list[int], max_tokens: int = 8) -> list[int]:
    """What a worker with room to spare and no cache answers."""
    answer: list[int] = world(num_blocks=256, max_batch_tokens=512, reuse=False).tokens(tokens, max_tokens=max_tokens)
    return answer


def test_the_same_tokens_in_a_batch_of_16(world: MakeWorld) -> None:
    fleet = world(num_blocks=256, max_batch_tokens=100)
    prompts = [prompt(5 + 3 * i, seed=i) for i in range(16)]
    ids = [fleet.submit(tokens) for tokens in prompts]
    fleet.run()
    assert [fleet.results[i].token_ids for i in ids] == [alone(world, tokens) for tokens in prompts]
    assert max(len(batch.sequences) for batch in fleet.batches) == 16
    fleet.assert_nothing_held()


@pytest.mark.parametrize("budget", [1, 3, 4, 7, 64])
def test_the_same_tokens_in_chunks(world: MakeWorld, budget: int) -> None:
    tokens = prompt(61)
    fleet = world(max_batch_tokens=budget)
    assert fleet.tokens(tokens) == alone(world, tokens)
    assert max(batch.num_tokens for batch in fleet.batches) <= budget
    assert sum(batch.num_tokens for batch in fleet.batches) == 61 + 7


def test_a_chunk_that_ends_before_the_last_token_samples_nothing(world: MakeWorld) -> None:
    fleet = world(max_batch_tokens=10)
    fleet.tokens(prompt(25), max_tokens=1)
    assert [share.sampling is None for batch in fleet.batches for share in batch.sequences] == [True, True, False]


def test_the_same_tokens_after_preemption(world: MakeWorld) -> None:
    fleet = world(num_blocks=16, max_batch_tokens=32)  # 64 positions for 5 x 36
    prompts = [prompt(20, seed=i) for i in range(5)]
    ids = [fleet.submit(tokens, max_tokens=16) for tokens in prompts]
    fleet.run()
    assert fleet.scheduler.num_preemptions > 0
    assert [fleet.results[i].token_ids for i in ids] == [alone(world, tokens, 16) for tokens in prompts]
    fleet.assert_nothing_held()


def test_the_latest_is_preempted_first_and_comes_back_to_its_cached_blocks(world: MakeWorld) -> None:
    fleet = world(num_blocks=12, max_batch_tokens=64)
    first, second = (fleet.submit(prompt(20, seed=i), max_tokens=24) for i in range(2))
    while not fleet.scheduler.num_preemptions:
        fleet.step()
    assert [share.sequence_id for share in fleet.batches[-1].sequences] == [first]
    fleet.run()
    resumed = next(
        share
        for batch in fleet.batches
        for share in batch.sequences
        if share.sequence_id == second and len(share.token_ids) > 1 and share.start > 0
    )
    assert resumed.start % 4 == 0
    assert fleet.results[second].token_ids == alone(world, prompt(20, seed=1), 24)


def test_preemption_within_a_prompt_changes_no_admission_facts_and_queues_its_tokens_again(world: MakeWorld) -> None:
    fleet = world(num_blocks=15, max_batch_tokens=6)
    first = fleet.submit(prompt(18), max_tokens=30)
    fleet.step()
    fleet.step()
    second = fleet.submit(prompt(36, seed=1), max_tokens=2)
    while not fleet.scheduler.num_preemptions:
        assert fleet.scheduler.num_queued_tokens < 53
        fleet.step()
    assert not fleet.results[second].token_ids
    assert fleet.scheduler.num_queued_tokens == 35
    fleet.run()
    assert fleet.results[second].outputs[0].admission.cached_device_tokens == 0
    assert fleet.results[second].token_ids == alone(world, prompt(36, seed=1), 2)
    assert fleet.results[first].token_ids == alone(world, prompt(18), 30)


def test_a_prefix_hit_computes_the_tail_only(world: MakeWorld) -> None:
    fleet = world()
    head = prompt(32)
    fleet.tokens([*head, 5, 6, 7])
    computed = sum(batch.num_tokens for batch in fleet.batches)
    second = fleet.submit([*head, 8, 9])
    fleet.run()
    result = fleet.results[second]
    assert result.token_ids == alone(world, [*head, 8, 9])
    assert result.outputs[0].admission.cached_device_tokens == 32
    assert sum(batch.num_tokens for batch in fleet.batches) - computed == 2 + 7
    assert [output.admission is None for output in result.outputs] == [False] + [True] * 7


def test_one_token_is_always_left_to_compute(world: MakeWorld) -> None:
    fleet = world()
    tokens = prompt(32)
    first, second = fleet.tokens(tokens), fleet.tokens(tokens)
    assert first == second
    facts = fleet.results[1].outputs[0].admission
    assert (facts.cached_device_tokens, facts.blocks_copied) == (31, 1)


def test_a_scope_hits_its_own_blocks_only(world: MakeWorld) -> None:
    fleet = world()
    tokens = prompt(33)
    answers = [fleet.tokens(tokens, tenant=tenant) for tenant in ("a", "b", "a")]
    cached = [fleet.results[i].outputs[0].admission.cached_device_tokens for i in range(3)]
    assert cached == [0, 0, 32]
    assert answers[0] == answers[1] == answers[2]


def test_a_published_head_is_shared_and_told_apart(world: MakeWorld) -> None:
    fleet = world()
    public = ScopeRoot(b"p" * 16)
    tokens = prompt(33)
    for tenant in (b"a", b"b"):
        fleet.tokens(tokens, regions=(Region(public, 16), Region(ScopeRoot(tenant * 16), None)))
    facts = fleet.results[1].outputs[0].admission
    assert (facts.cached_device_tokens, facts.cached_published_tokens) == (16, 16)


def test_no_store_leaves_nothing_behind(world: MakeWorld) -> None:
    fleet = world()
    fleet.tokens(prompt(33), no_store=True)
    assert fleet.pool.num_cached == 0


def test_a_continuation_goes_on_where_the_other_worker_stopped(world: MakeWorld) -> None:
    tokens = prompt(21)
    whole = alone(world, tokens, 12)
    fleet = world()
    sequence = fleet.submit(tokens + whole[:5], num_prompt_tokens=21, max_tokens=12)
    fleet.run()
    result = fleet.results[sequence]
    assert result.outputs[0].first_index == 5
    assert result.token_ids == whole[5:]
    assert result.finish is Finish.LENGTH


def test_a_continuation_that_has_all_its_tokens_ends_at_once(world: MakeWorld) -> None:
    fleet = world()
    sequence = fleet.submit(prompt(20), num_prompt_tokens=12, max_tokens=8, deadline=5.0)
    assert fleet.results[sequence].finish is Finish.LENGTH
    assert not fleet.step()


def test_a_stop_token_ends_it_and_is_the_last_token(world: MakeWorld) -> None:
    tokens = prompt(10)
    whole = alone(world, tokens)
    fleet = world()
    sequence = fleet.submit(tokens, stop_token_ids=(whole[3],))
    fleet.run()
    result = fleet.results[sequence]
    assert result.token_ids == whole[:4]
    assert result.finish is Finish.STOP
    assert result.outputs[-1].stop_token_id == whole[3]


def test_stop_tokens_are_banned_until_min_tokens(world: MakeWorld) -> None:
    tokens = prompt(10)
    stop = alone(world, tokens)[1]
    fleet = world()
    answer = fleet.tokens(tokens, stop_token_ids=(stop,), min_tokens=5, max_tokens=8)
    assert stop not in answer[:5]
    assert [share.banned_token_ids for batch in fleet.batches for share in batch.sequences][:6] == [(stop,)] * 5 + [()]


@pytest.mark.parametrize(
    ("length", "max_tokens", "reason"),
    [(190, 11, "CONTEXT_LENGTH"), (60, 7, "KV_CAPACITY"), (190, 10, "KV_CAPACITY"), (60, 5, ""), (1, 64, "")],
)
def test_what_can_never_fit_is_rejected_at_once(world: MakeWorld, length: int, max_tokens: int, reason: str) -> None:
    fleet = world(num_blocks=16)  # 64 positions; the last token needs none
    sequence = fleet.submit(prompt(length), max_tokens=max_tokens)
    fleet.run()
    result = fleet.results[sequence]
    assert result.outputs[-1].reason == reason
    assert result.finish is (Finish.REJECTED if reason else Finish.LENGTH)
    fleet.assert_nothing_held()


def test_a_full_queue_and_a_drain_reject(world: MakeWorld) -> None:
    fleet = world(max_waiting=2)
    for i in range(3):
        fleet.submit(prompt(10, seed=i))
    assert fleet.results[2].outputs[-1].reason == "QUEUE_FULL"
    fleet.scheduler.draining = True
    fleet.submit(prompt(10))
    assert fleet.results[3].outputs[-1].reason == "DRAINING"
    fleet.run()
    assert [fleet.results[i].finish for i in (0, 1)] == [Finish.LENGTH] * 2


def test_no_more_than_max_sequences_run(world: MakeWorld) -> None:
    fleet = world(num_blocks=256, max_sequences=3)
    for i in range(8):
        fleet.submit(prompt(10, seed=i))
    fleet.run()
    assert max(len(batch.sequences) for batch in fleet.batches) == 3


def test_the_queue_goes_by_priority_then_arrival(world: MakeWorld) -> None:
    fleet = world(max_sequences=1)
    ids = [fleet.submit(prompt(10, seed=i), priority=priority, max_tokens=1) for i, priority in enumerate((0, 1, 0, 1))]
    fleet.run()
    order = [share.sequence_id for batch in fleet.batches for share in batch.sequences]
    assert order == [ids[1], ids[3], ids[0], ids[2]]


def test_nothing_expired_is_computed(world: MakeWorld) -> None:
    fleet = world(max_sequences=1)
    running = fleet.submit(prompt(10), max_tokens=100, deadline=0.05)
    waiting = fleet.submit(prompt(10, seed=1), deadline=0.01)
    fleet.run()
    assert fleet.results[running].finish is fleet.results[waiting].finish is Finish.DEADLINE
    assert fleet.results[running].token_ids and not fleet.results[waiting].token_ids
    assert waiting not in {share.sequence_id for batch in fleet.batches for share in batch.sequences}
    fleet.assert_nothing_held()


@pytest.mark.parametrize("steps", range(0, 14))
def test_cancel_at_any_point_frees_everything_at_once(world: MakeWorld, steps: int) -> None:
    fleet = world(max_batch_tokens=5)
    sequence = fleet.submit(prompt(30), deadline=99.0)
    for _ in range(steps):
        fleet.step()
    ended = fleet.results[sequence].finish
    fleet.cancel(sequence)
    assert fleet.results[sequence].finish is (ended or Finish.CANCELLED)
    assert fleet.scheduler.num_sequences == 0
    fleet.assert_nothing_held()


def test_a_failed_step_ends_its_sequences_and_no_others(world: MakeWorld) -> None:
    fleet = world(max_sequences=1)
    hit, spared = fleet.submit(prompt(10)), fleet.submit(prompt(10, seed=1))
    batch = fleet.scheduler.schedule(0.0)
    fleet.scheduler.fail(batch, "RUNNER_ERROR")
    fleet.run()
    assert fleet.results[hit].finish is Finish.ERROR
    assert fleet.results[hit].outputs[-1].reason == "RUNNER_ERROR"
    assert fleet.results[spared].token_ids == alone(world, prompt(10, seed=1))
    fleet.assert_nothing_held()


def test_a_pool_for_one_serves_many_without_livelock(world: MakeWorld) -> None:
    fleet = world(num_blocks=16, max_batch_tokens=32)
    ids = [fleet.submit(prompt(4 + i % 40, seed=i % 7), max_tokens=1 + i % 20) for i in range(200)]
    fleet.run(most_steps=20_000)
    assert all(fleet.results[i].finish is Finish.LENGTH for i in ids)
    fleet.assert_nothing_held()


def drive(fleet: Any, seed: int, operations: int) -> dict[int, tuple[list[int], int, list[int]]]:
    """Random submits, cancels and steps; what each submitted sequence asked for and the tokens it got."""
    rng = random.Random(seed)
    asked: dict[int, tuple[list[int], int]] = {}
    for _ in range(operations):
        action = rng.random()
        if action < 0.3:
            head = prompt(rng.choice((0, 8, 16, 32)), seed=rng.randrange(3))
            tokens = head + prompt(rng.randrange(1, 12), seed=rng.randrange(4))
            most = rng.randrange(1, 12)
            sequence = fleet.submit(
                tokens, max_tokens=most, tenant=rng.choice("ab"), priority=rng.randrange(2), no_store=rng.random() < 0.1
            )
            asked[sequence] = (tokens, most)
        elif action < 0.36 and asked:
            fleet.cancel(rng.choice(list(asked)))
        else:
            fleet.step()
            fleet.pool.check()
    fleet.run()
    return {i: (*asked[i], fleet.results[i].token_ids) for i in asked}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**20), num_blocks=st.integers(14, 40), budget=st.sampled_from((3, 17, 64)))
def test_300_random_operations(world: MakeWorld, seed: int, num_blocks: int, budget: int) -> None:
    """Reuse on, off, and with keys that collide: every answer is a prefix of the one a request gets alone."""
    shapes: list[dict[str, object]] = [{"reuse": True}, {"reuse": False}, {"reuse": True, "key_bits": 8}]
    whole: dict[tuple[int, ...], list[int]] = {}
    for shape in shapes:
        fleet = world(num_blocks=num_blocks, max_batch_tokens=budget, **shape)
        for sequence, (tokens, most, answer) in drive(fleet, seed, 300).items():
            key = tuple(tokens)
            if key not in whole:
                whole[key] = alone(world, tokens, 12)
            assert answer == whole[key][: len(answer)]
            assert fleet.results[sequence].finish in (Finish.LENGTH, Finish.CANCELLED)
            assert len(answer) == most or fleet.results[sequence].finish is Finish.CANCELLED
        fleet.assert_nothing_held()
