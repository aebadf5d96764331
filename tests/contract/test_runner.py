"""What every runner must do, asked of the simulated one and of the model: a batch's shape never shows in its tokens."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore.block_pool import BlockPool
from kvstore.scope import Region, ScopeRoot
from pando.settings import WorkerSettings
from worker.admission import SchedulerLimits
from worker.batch import Batch, BlockCopy, SamplingParams, ScheduledSequence
from worker.offload import Offload
from worker.runner import Runner, StepInFlight
from worker.scheduler import Scheduler
from worker.sequence import SequenceRequest

NUM_BLOCKS = 96
BLOCK_SIZE = 16
SETTINGS = WorkerSettings(
    model="pando-tiny",
    cpu_blocks=64,
    device="cpu",
    dtype="float32",
    device_blocks=NUM_BLOCKS,
    block_size=BLOCK_SIZE,
    simulated_step_ms=0.0,
    threads=1,
)


def simulated() -> Runner:
    from worker.simulated_runner import load_simulated_runner

    return load_simulated_runner(SETTINGS)


def model() -> Runner:
    from worker.model_runner import load_model_runner

    return load_model_runner(SETTINGS)


def streamed() -> Runner:
    """The model as on a device with a stream: launching gives work to it and waits for nothing."""
    runner: Any = model()
    runner._thread.shutdown()
    runner._thread = None
    return runner  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[simulated, model, streamed], ids=lambda load: load.__name__)
def load(request: pytest.FixtureRequest) -> Callable[[], Runner]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def runner(load: Callable[[], Runner]) -> Iterator[Runner]:
    made = load()
    yield made
    made.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 2000) for _ in range(length)]


def share(tokens: list[int], blocks: list[int], start: int = 0, **changes: Any) -> ScheduledSequence:
    return ScheduledSequence(1, array("I", tokens), start, blocks, **({"sampling": SamplingParams()} | changes))


def run(runner: Runner, *shares: ScheduledSequence) -> list[int]:
    return runner.execute(Batch(tuple(shares)))


def greedy(runner: Runner, tokens: list[int], blocks: list[int], steps: int, **changes: Any) -> list[int]:
    """Prefill at once, then one token a step."""
    found = run(runner, share(tokens, blocks, **changes))
    while len(found) < steps:
        found += run(runner, share(found[-1:], blocks, start=len(tokens) + len(found) - 1, **changes))
    return found


def test_the_spec_is_whole(runner: Runner) -> None:
    spec = runner.spec
    assert (spec.num_blocks, spec.block_size) == (NUM_BLOCKS, BLOCK_SIZE)
    assert len(spec.fingerprint) == 16
    assert spec.vocab_size > 2000
    assert spec.max_model_len > 0
    assert all(0 <= token < spec.vocab_size for token in spec.eos_token_ids)


def test_a_second_load_has_the_same_spec_and_tokens(runner: Runner, load: Callable[[], Runner]) -> None:
    second = load()
    assert second.spec == runner.spec
    assert greedy(second, prompt(20), [0, 1], 6) == greedy(runner, prompt(20), [0, 1], 6)
    second.close()


def test_one_token_for_each_share_with_sampling_in_order(runner: Runner) -> None:
    alone = [run(runner, share(prompt(9 + i, seed=i), [i]))[0] for i in range(4)]
    shares = [share(prompt(9 + i, seed=i), [i], sampling=None if i == 2 else SamplingParams()) for i in range(4)]
    assert run(runner, *shares) == [alone[0], alone[1], alone[3]]
    assert run(runner, shares[2]) == []


def test_blocks_may_lie_anywhere(runner: Runner) -> None:
    assert greedy(runner, prompt(40), [0, 1, 2, 3], 20) == greedy(runner, prompt(40), [50, 7, 95, 20], 20)


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunks_do_not_show(runner: Runner, chunk: int) -> None:
    tokens, blocks = prompt(50), [9, 3, 12, 30]
    whole = greedy(runner, tokens, [0, 1, 2, 4], 5)
    for start in range(0, 50 - chunk, chunk):
        last = start
        run(runner, share(tokens[start : start + chunk], blocks, start=start, sampling=None))
        last = start + chunk
    first = run(runner, share(tokens[last:], blocks, start=last))
    rest = [*first]
    while len(rest) < 5:
        rest += run(runner, share(rest[-1:], blocks, start=50 + len(rest) - 1))
    assert rest == whole


def test_a_mixed_batch_does_not_show(runner: Runner) -> None:
    prompts = [prompt(3 + 5 * i, seed=i) for i in range(16)]
    tables = [[6 * i + j for j in range(6)] for i in range(16)]
    alone = [greedy(runner, tokens, table, 4) for tokens, table in zip(prompts, tables, strict=True)]
    found = [[token] for token in run(runner, *map(share, prompts, tables))]
    for _ in range(3):
        late = share(prompt(30, seed=99), [90, 91], sampling=None)
        decodes = [
            share(out[-1:], table, start=len(tokens) + len(out) - 1)
            for tokens, table, out in zip(prompts[:15], tables, found, strict=False)
        ]
        for out, token in zip(found, run(runner, late, *decodes), strict=False):
            out.append(token)
    assert found[:15] == alone[:15]


def test_shared_blocks_give_what_own_blocks_give(runner: Runner) -> None:
    head, tails = prompt(32), [prompt(5 + i, seed=i + 1) for i in range(3)]
    alone = [greedy(runner, head + tail, [0, 1, 2, 3], 6) for tail in tails]
    run(runner, share(head, [40, 41], sampling=None))
    found = [
        [token] for token in run(runner, *(share(t, [40, 41, 50 + i, 60 + i], start=32) for i, t in enumerate(tails)))
    ]
    for _ in range(5):
        decodes = [
            share(out[-1:], [40, 41, 50 + i, 60 + i], start=32 + len(tails[i]) + len(out) - 1)
            for i, out in enumerate(found)
        ]
        for out, token in zip(found, run(runner, *decodes), strict=True):
            out.append(token)
    assert found == alone


def test_copies_are_made_before_the_step(runner: Runner) -> None:
    tokens = prompt(24)
    whole = run(runner, share(tokens, [0, 1]))
    batch = Batch((share(tokens[20:], [0, 70], start=20),), copies=(BlockCopy(1, 70, 4),))
    assert runner.execute(batch) == whole


def test_forks_draw_after_the_same_token_each_by_its_own_seed(runner: Runner) -> None:
    ways = [SamplingParams(temperature=1.0, seed=seed) for seed in range(3)]
    alone = [run(runner, share(prompt(20), [0, 1], sampling=way))[0] for way in ways]
    other = share(prompt(9, seed=1), [5])
    forked = share(prompt(20), [2, 3], sampling=ways[0], fork_sampling=tuple(ways[1:]))
    assert run(runner, other, forked, other) == [*run(runner, other), *alone, *run(runner, other)]


def test_banned_tokens_are_not_drawn(runner: Runner) -> None:
    tokens = prompt(12)
    banned: tuple[int, ...] = ()
    for _ in range(6):
        (token,) = run(runner, share(tokens, [0], banned_token_ids=banned))
        assert token not in banned
        banned += (token,)


def test_a_draw_depends_on_seed_and_position_alone(runner: Runner) -> None:
    def drawn(seed: int) -> list[int]:
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return greedy(runner, prompt(12), [0, 1], 8, sampling=sampling)

    first = drawn(1)
    run(runner, share(prompt(9, seed=5), [3], sampling=SamplingParams(temperature=1.0, seed=77)))
    assert drawn(1) == first
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


def test_a_launched_step_answers_as_one_that_is_waited_for(runner: Runner) -> None:
    shares = [share(prompt(9 + i, seed=i), [i]) for i in range(3)]
    wanted = run(runner, *shares)
    step = runner.launch(Batch(tuple(shares)))
    while not step.wait(0.01):
        pass
    assert step.tokens() == wanted


def test_a_step_follows_the_draws_of_the_one_launched_before(runner: Runner) -> None:
    prompts, tables = [prompt(7 + 9 * i, seed=i) for i in range(3)], [[6 * i + j for j in range(6)] for i in range(3)]
    alone = [greedy(runner, tokens, table, 4) for tokens, table in zip(prompts, tables, strict=True)]
    launched = [runner.launch(Batch(tuple(map(share, prompts, tables))))]
    found: list[list[int]] = []
    for step in range(3):
        # In another order each time, beside one of which the tokens are known.
        order = [(step + i) % 3 for i in range(3)]
        place = {one: at for at, one in enumerate([0, 1, 2] if not step else [(step - 1 + i) % 3 for i in range(3)])}
        shares = [share([0], tables[i], start=len(prompts[i]) + step, follows=place[i]) for i in order]
        launched.append(runner.launch(Batch((*shares, share(prompt(30, seed=9), [90, 91], sampling=None)))))
        drawn = launched.pop(0).tokens()
        found.append([drawn[place[i]] for i in range(3)])
    last = launched.pop().tokens()
    found.append([last[order.index(i)] for i in range(3)])
    assert [list(tokens) for tokens in zip(*found, strict=True)] == alone


def test_a_table_may_change_when_its_step_is_launched(runner: Runner) -> None:
    tokens = prompt(40)
    wanted = run(runner, share(tokens, [0, 1, 2]))
    table = [3, 4, 5]
    step = runner.launch(Batch((share(tokens, table),)))
    table[:] = [-1, 95, -1]
    assert step.tokens() == wanted


def attempt(runner: Runner, one: ScheduledSequence) -> StepInFlight | None:
    """A step that will fail: with its tokens, or when it is launched."""
    try:
        return runner.launch(Batch((one,)))
    except (ValueError, IndexError):
        return None


def test_a_step_runs_behind_one_that_failed(runner: Runner) -> None:
    wanted = run(runner, share(prompt(20, seed=1), [4, 5]))
    nothing_left = (*range(runner.spec.vocab_size), 1 << 40)
    broken = attempt(runner, share(prompt(20), [0, 1], banned_token_ids=nothing_left))
    behind = runner.launch(Batch((share([0], [0, 1], start=20, follows=0), share(prompt(20, seed=1), [6, 7], start=0))))
    if broken is not None:
        with pytest.raises((ValueError, IndexError)):
            broken.tokens()
    assert behind.tokens()[1:] == wanted


def engine_run(
    runner: Runner, *, num_blocks: int, budget: int, reuse: bool, offloading: bool = False, overlap: bool = False
) -> tuple[list[list[int]], Scheduler, Offload | None]:
    """Eight requests over two heads through the real scheduler, twice one after the other: their tokens."""
    pool = BlockPool(num_blocks, BLOCK_SIZE, reuse=reuse)
    offload = Offload(pool, runner.mover) if offloading and runner.mover is not None else None
    tiers = offload.tiers if offload is not None else None
    scheduler = Scheduler(pool, SchedulerLimits(budget, 8, 100, runner.spec.max_model_len), tiers=tiers)
    region = (Region(ScopeRoot(bytes(16)), None),)
    found: list[list[int]] = [[] for _ in range(16)]
    for number in range(16):
        i = number % 8
        tokens = array("I", prompt(48, seed=i % 2) + prompt(3 + i, seed=10 + i))
        scheduler.submit(SequenceRequest(number, tokens, len(tokens), region, SamplingParams(max_tokens=24)), 0.0)
        if number not in (7, 15):
            continue
        launched: deque[tuple[Batch, StepInFlight]] = deque()
        while scheduler.num_sequences or launched or (offload is not None and offload.num_moving):
            for _ in range(1 + overlap - len(launched)):
                if offload is not None:
                    offload.answer(step_s=0.0, num_sequences=1, prefill_tokens_per_s=0.0)
                batch = scheduler.schedule(0.0)
                if offload is not None:
                    offload.order(idle=batch is None and not launched)
                if batch is not None:
                    launched.append((batch, runner.launch(batch)))
            if launched:
                batch, step = launched.popleft()
                scheduler.complete(batch, step.tokens())
            for output in scheduler.take_outputs():
                found[output.sequence_id] += output.token_ids
    assert pool.num_referenced == 0
    return found, scheduler, offload


def test_scheduling_does_not_show(runner: Runner) -> None:
    """Batched with room, in small chunks, from a cache, and preempted in a pool for two: the same tokens."""
    wanted, calm, _ = engine_run(runner, num_blocks=NUM_BLOCKS, budget=512, reuse=False)
    assert calm.num_preemptions == 0
    assert engine_run(runner, num_blocks=NUM_BLOCKS, budget=40, reuse=True)[0] == wanted
    preempted, pressed, _ = engine_run(runner, num_blocks=11, budget=64, reuse=True)
    assert preempted == wanted
    assert pressed.num_preemptions > 0


def test_overlap_does_not_show(runner: Runner) -> None:
    wanted, _, _ = engine_run(runner, num_blocks=NUM_BLOCKS, budget=512, reuse=False)
    assert engine_run(runner, num_blocks=NUM_BLOCKS, budget=40, reuse=True, overlap=True)[0] == wanted
    preempted, pressed, _ = engine_run(runner, num_blocks=11, budget=64, reuse=True, overlap=True)
    assert preempted == wanted
    assert pressed.num_preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_offloading_does_not_show(runner: Runner, overlap: bool) -> None:
    wanted, _, _ = engine_run(runner, num_blocks=NUM_BLOCKS, budget=512, reuse=False)
    found, _, offload = engine_run(runner, num_blocks=11, budget=64, reuse=True, offloading=True, overlap=overlap)
    assert found == wanted
    assert offload is not None
    assert offload.counts.promoted > 0
    assert offload.counts.corrupt == 0


def run_of_tenants(runner: Runner, head: int, *, budget: int, reuse: bool) -> tuple[list[list[int]], int]:
    """Six tenants at once behind one published head, tails that begin alike: their tokens, and head tokens computed."""
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, reuse=reuse)
    scheduler = Scheduler(pool, SchedulerLimits(budget, 8, 100, runner.spec.max_model_len))
    found: list[list[int]] = [[] for _ in range(6)]
    for number in range(6):
        tokens = array("I", prompt(head) + prompt(4, seed=1) + prompt(3 + number, seed=10 + number))
        regions = (Region(ScopeRoot(bytes(16)), head), Region(ScopeRoot(bytes([number + 1] * 16)), None))
        scheduler.submit(SequenceRequest(number, tokens, len(tokens), regions, SamplingParams(max_tokens=12)), 0.0)
    computed = 0
    while (batch := scheduler.schedule(0.0)) is not None:
        computed += sum(max(0, min(head, one.start + len(one.token_ids)) - one.start) for one in batch.sequences)
        scheduler.complete(batch, runner.execute(batch))
        for output in scheduler.take_outputs():
            found[output.sequence_id] += output.token_ids
    assert pool.num_referenced == 0
    return found, computed


@pytest.mark.parametrize("head", [5, 32, 42])
def test_a_published_head_does_not_show(runner: Runner, head: int) -> None:
    wanted, computed = run_of_tenants(runner, head, budget=512, reuse=False)
    assert computed == 6 * head
    for budget in (13, 512):
        assert run_of_tenants(runner, head, budget=budget, reuse=True) == (wanted, head)
