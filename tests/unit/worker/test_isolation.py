"""What one tenant left behind is found by itself and by nobody else, wherever it lies: both halves, each time."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from kvstore.block import WorkerId
from kvstore.block_key import block_keys
from kvstore.block_pool import BlockPool
from kvstore.events import CPU, DEVICE
from kvstore.memory_index import MemoryIndex
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot, scope_root
from worker.admission import SchedulerLimits
from worker.batch import SamplingParams
from worker.engine import Engine, StepReport
from worker.holdings import Holdings, OwnerQuota, PinRequest
from worker.offload import Offload
from worker.scheduler import Scheduler
from worker.sequence import Finish, SequenceRequest
from worker.simulated_runner import SimulatedRunner, StepCost

MakeWorld = Callable[..., Any]
LENGTH = 50
HEAD = 18
PUBLIC = ScopeRoot(b"public".ljust(16))


def prompt(length: int = LENGTH, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def own(tenant: str) -> tuple[Region, ...]:
    return (Region(ScopeRoot(tenant.encode().ljust(16, b"-")), None),)


def alone(world: MakeWorld, tokens: list[int], max_tokens: int = 8) -> list[int]:
    """What a worker with room to spare and no cache answers."""
    answer: list[int] = world(num_blocks=1024, max_batch_tokens=512, max_model_len=2000, reuse=False).tokens(
        tokens, max_tokens=max_tokens
    )
    return answer


class Found(NamedTuple):
    """What admission found of one request."""

    device: int
    cpu: int
    published: int
    copied: int


def found(fleet: Any, sequence: int) -> Found:
    facts = next(output.admission for output in fleet.results[sequence].outputs if output.admission)
    return Found(
        facts.cached_device_tokens, facts.cached_cpu_tokens, facts.cached_published_tokens, facts.blocks_copied
    )


def asked(fleet: Any, tokens: list[int], **how: Any) -> Found:
    """What one request finds that runs to its end."""
    sequence = fleet.submit(tokens, **how)
    fleet.run()
    return found(fleet, sequence)


NOTHING = Found(0, 0, 0, 0)


# Ways to leave something behind: what makes the worker, and what tenant a does there.


def finished(fleet: Any) -> None:
    fleet.tokens(prompt())


def demoted(fleet: Any) -> None:
    """Only the CPU tier has it: other tenants' prompts have filled the device."""
    fleet.tokens(prompt())
    for i in range(6):
        fleet.tokens(prompt(60, seed=100 + i), tenant="z", max_tokens=1)


def forked(fleet: Any) -> None:
    """Its forks run still."""
    first = fleet.submit(prompt(), fork_seeds=(1, 2), temperature=1.0, max_tokens=40)
    while not fleet.results[first].outputs:
        fleet.step()


def computing(fleet: Any) -> None:
    """It is in the middle of its prompt, and others could wait for the rest."""
    fleet.submit(prompt())
    for _ in range(3):
        fleet.step()


def preempted(fleet: Any) -> None:
    fleet.submit(prompt())
    for _ in range(5):
        fleet.step()
    fleet.scheduler._preempt(fleet.scheduler._running[-1])


def cancelled(fleet: Any) -> None:
    gone = fleet.submit(prompt())
    for _ in range(5):
        fleet.step()
    fleet.cancel(gone)


def failed(fleet: Any) -> None:
    fleet.submit(prompt())
    for _ in range(5):
        fleet.step()
    fleet.scheduler.fail(fleet.scheduler.schedule(fleet.now), "RUNNER_ERROR")


def pinned(fleet: Any) -> None:
    fleet.tokens(prompt())
    quota = OwnerQuota(Quota(pinned=20))
    assert fleet.holdings.pin(PinRequest("x", own("a"), (), array("I", prompt()), 60.0, quota), fleet.now) == 48


WAYS: dict[Callable[[Any], None], dict[str, int]] = {
    finished: {},
    demoted: {"num_blocks": 32, "num_cpu_blocks": 256},
    forked: {},
    computing: {"max_batch_tokens": 8},
    preempted: {"max_batch_tokens": 8},
    cancelled: {"max_batch_tokens": 8},
    failed: {"max_batch_tokens": 8},
    pinned: {},
}


@pytest.mark.parametrize("key_bits", [128, 8])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("first", ["a", "b"])
def test_a_finds_it_and_b_does_not(world: MakeWorld, way: Callable[[Any], None], key_bits: int, first: str) -> None:
    """In either order, together in one queue. Short keys meet often, and may cost hits, never give one."""
    fleet = world(**WAYS[way], key_bits=key_bits)
    way(fleet)
    ids = {tenant: fleet.submit(prompt(), tenant=tenant) for tenant in sorted("ab", reverse=first == "b")}
    fleet.run()
    mine, others = found(fleet, ids["a"]), found(fleet, ids["b"])
    assert others == NOTHING
    assert mine.device + mine.cpu > 0 and mine.published == 0
    if key_bits == 128:
        # All full blocks; of a prompt that was broken off, those of the steps before.
        assert mine.device + mine.cpu >= (40 if way in (preempted, cancelled, failed) else 48)
        assert bool(mine.cpu) == (way is demoted)
    assert [fleet.results[i].token_ids for i in ids.values()] == [alone(world, prompt())] * 2


@pytest.mark.parametrize("key_bits", [128, 8])
@pytest.mark.parametrize("cut", range(41, 49))
def test_a_takes_a_part_of_its_block_and_b_does_not(world: MakeWorld, cut: int, key_bits: int) -> None:
    fleet = world(key_bits=key_bits)
    fleet.tokens(prompt())
    other = [*prompt()[:cut], *prompt(9, seed=1)]
    assert asked(fleet, other, tenant="b") == NOTHING
    mine = asked(fleet, other)
    assert mine.device > 0
    if key_bits == 128:
        assert mine == Found(cut, 0, 0, int(cut % 4 > 0))


@pytest.mark.parametrize("cpu_blocks", [0, 256])
@pytest.mark.parametrize("end", [HEAD, 16, 3])
def test_b_finds_the_published_head_to_its_end_and_a_finds_all(world: MakeWorld, end: int, cpu_blocks: int) -> None:
    fleet = world(num_blocks=32 if cpu_blocks else 64, num_cpu_blocks=cpu_blocks)
    of = {tenant: (Region(PUBLIC, end), *own(tenant)) for tenant in "abc"}
    fleet.tokens(prompt(), regions=of["a"])
    # Bare, as its publisher warms it: what of it ends inside a block is found too.
    fleet.tokens(prompt(20)[:end] + prompt(5, seed=2), regions=(Region(PUBLIC, None),))
    if cpu_blocks:
        for i in range(6):
            fleet.tokens(prompt(60, seed=100 + i), tenant="z", max_tokens=1)
    full = end // 4 * 4
    theirs = asked(fleet, prompt(), regions=of["b"])
    assert theirs.device + theirs.cpu == theirs.published
    assert full <= theirs.published <= end
    assert asked(fleet, prompt(), tenant="c") == NOTHING
    mine = asked(fleet, prompt(), regions=of["a"])
    assert mine.device + mine.cpu >= 48 and full <= mine.published <= end


@pytest.mark.parametrize("tier", [DEVICE, CPU])
def test_the_index_leads_a_to_it_and_b_nowhere(world: MakeWorld, tier: int) -> None:
    way = demoted if tier == CPU else finished
    fleet, index, name = world(**WAYS[way]), MemoryIndex(), WorkerId("w")
    way(fleet)
    index.apply(name, 1, (fleet.tiers or fleet.pool).take_events())
    keys = {tenant: block_keys(own(tenant), array("I", prompt()), 4) for tenant in "ab"}
    assert not set(keys["a"]) & set(keys["b"])
    [(worker, cached)] = index.match(keys["a"]).items()
    assert worker == name
    assert (cached.cpu_blocks if tier == CPU else cached.device_blocks) == 12
    assert index.match(keys["b"]) == {}
    fleet.holdings.purge([own("a")[0].root])
    index.apply(name, 1, (fleet.tiers or fleet.pool).take_events())
    assert index.match(keys["a"]) == {}


def test_published_keys_lead_everybody_to_the_head_alone() -> None:
    """As far as the head goes the keys are one; behind it no two tenants have one in common."""
    chains = [block_keys((Region(PUBLIC, HEAD), *own(tenant)), array("I", prompt()), 4) for tenant in "abc"]
    assert len({tuple(chain[: HEAD // 4]) for chain in chains}) == 1
    tails = [set(chain[HEAD // 4 :]) for chain in chains]
    assert len(set.union(*tails)) == sum(map(len, tails)) == 3 * (12 - HEAD // 4)


def test_a_purge_takes_from_a_and_leaves_b(world: MakeWorld) -> None:
    for way, shape in WAYS.items():
        fleet = world(**shape)
        fleet.tokens(prompt(), tenant="b", max_tokens=1)
        way(fleet)
        fleet.scheduler.cancel_owners({own("a")[0].root})
        fleet._take()
        count = fleet.holdings.purge([own("a")[0].root])
        assert count.device_blocks + count.cpu_blocks > 0 and count.remaining == 0, way.__name__
        assert asked(fleet, prompt(), max_tokens=1) == NOTHING, way.__name__
        theirs = asked(fleet, prompt(), tenant="b", max_tokens=1)
        assert theirs.device + theirs.cpu >= 48, way.__name__


# Keys that meet


def test_a_recorded_pair_of_prompts_with_one_key_costs_a_miss_and_nothing_else(world: MakeWorld) -> None:
    """Blocks of valid token ids in one scope whose keys are equal in their first 40 bits, through a whole worker."""
    regions = (Region(scope_root(b"recorded", b"model", "tenant:a", block_size=16), None),)
    one, other = ([*pair, *[0] * 14, 7] for pair in ((26327, 57), (25002, 117)))
    first, second = (block_keys(regions, array("I", tokens), 16, key_bits=40)[0] for tokens in (one, other))
    assert first == second
    fleet = world(block_size=16, key_bits=40)
    answers = {}
    for tokens in (one, other, other, one):
        sequence = fleet.submit(tokens, regions=regions)
        fleet.run()
        answers.setdefault(tuple(tokens), []).append((found(fleet, sequence).device, fleet.results[sequence].token_ids))
    assert answers == {
        tuple(one): [(0, alone(world, one)), (16, alone(world, one))],
        tuple(other): [(0, alone(world, other))] * 2,
    }
    assert fleet.pool.contents.collisions > 0
    fleet.assert_nothing_held()


def test_equal_text_under_equal_keys_is_anothers_all_the_same(world: MakeWorld) -> None:
    """With keys of one bit every other tenant's first block has the key of a's."""
    fleet = world(key_bits=1)
    fleet.tokens(prompt())
    strangers = [f"b{number}" for number in range(12)]
    assert {asked(fleet, prompt(), tenant=name, max_tokens=1) for name in strangers} == {NOTHING}
    assert fleet.pool.contents.collisions > len(strangers)
    assert asked(fleet, prompt()).device >= 4


@pytest.mark.parametrize("num_cpu_blocks", [0, 60])
@pytest.mark.parametrize("key_bits", [8, 128])
def test_an_engine_with_short_keys_answers_as_without_a_cache(
    world: MakeWorld, model_spec: Any, key_bits: int, num_cpu_blocks: int
) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    spec = model_spec(num_blocks=48, max_model_len=200)
    runner = SimulatedRunner(
        spec, StepCost(0.001, 0.0001), num_cpu_blocks=num_cpu_blocks, sleep=sleep, clock=lambda: clock[0]
    )
    pool = BlockPool(spec.num_blocks, spec.block_size, key_bits=key_bits)
    offload = Offload(pool, runner.mover) if runner.mover is not None else None
    tiers = offload.tiers if offload is not None else None
    holdings = Holdings(pool, tiers)
    scheduler = Scheduler(pool, SchedulerLimits(32, 8, 1000, 200), holdings=holdings, tiers=tiers)
    reports: list[StepReport] = []
    engine = Engine(runner, pool, scheduler, reports.append, holdings=holdings, offload=offload, clock=lambda: clock[0])
    rng = random.Random(key_bits + num_cpu_blocks)
    prompts = []
    for number in range(80):
        tokens = prompt(rng.choice((8, 24, 40)), seed=rng.randrange(3)) + prompt(rng.randrange(1, 14), rng.randrange(5))
        head = () if rng.random() < 0.5 else (Region(PUBLIC, min(8, len(tokens))),)
        request = SequenceRequest(
            number, array("I", tokens), len(tokens), (*head, *own(rng.choice("ab"))), SamplingParams(max_tokens=6)
        )
        prompts.append(tokens)
        engine.submit(request)
        for _ in range(rng.randrange(4)):
            engine.step()
    while scheduler.num_sequences:
        if not engine.step():
            clock[0] += 0.001
    answers: dict[int, list[int]] = {number: [] for number in range(80)}
    for report in reports:
        for output in report.outputs:
            assert output.finish in (None, Finish.LENGTH)
            answers[output.sequence_id] += output.token_ids
    assert [answers[number] for number in range(80)] == [alone(world, tokens, 6) for tokens in prompts]
    assert (pool.contents.collisions > 0) == (key_bits == 8)
    assert pool.num_referenced == 0
    (tiers or pool).check(deep=True)
