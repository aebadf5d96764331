"""What is freed is gone: a marker that one tenant sent is found nowhere then, and what free memory holds shows nowhere.

The marker is looked for in the bytes of the tiers and in every object that a worker's parts lead to.
"""

from __future__ import annotations

import gc
import random
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot
from tests.oracle import make_checkpoint
from tests.runner_driver import load, random_tokens
from worker.holdings import OwnerQuota, PinRequest
from worker.sequence import Finish
from worker.simulated_mover import NEVER_WRITTEN

MakeWorld = Callable[..., Any]
MARKER = [431, 307, 442, 318, 453, 329, 464, 340]
A = ScopeRoot(b"a".ljust(16, b"-"))


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(length)]


def secret(length: int = 48) -> list[int]:
    """The marker over and over: every block of four holds half of it."""
    return (MARKER * length)[:length]


def holds_marker(data: Any) -> bool:
    """Whether a run of four of the marker's tokens is in these bytes, as u32 in either of its two alignments."""
    raw = bytes(data)
    return any(array("I", MARKER[at : at + 4]).tobytes() in raw for at in (0, 4))


def reachable(*roots: object) -> Iterator[object]:
    """Every object that these lead to, but for code."""
    seen: set[int] = set()
    todo: list[object] = list(roots)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(one))
        yield one
        todo += gc.get_referents(one)


def traces(fleet: Any) -> set[str]:
    """The kinds of objects in the worker's parts that hold the marker; numbers and lists of numbers too."""
    found = set()
    for one in reachable(fleet.pool, fleet.tiers, fleet.offload, fleet.holdings, fleet.scheduler):
        if isinstance(one, (bytes, bytearray, array)) and holds_marker(one):
            found.add(type(one).__name__)
        elif isinstance(one, (list, tuple)) and len(one) >= 4 and all(isinstance(item, int) for item in one):
            runs = (list(one[at : at + 4]) for at in range(len(one) - 3))
            found |= {type(one).__name__ for run in runs if run in (MARKER[:4], MARKER[4:])}
    return found


def flush(fleet: Any) -> None:
    for i in range(6):
        fleet.tokens(prompt(60, seed=100 + i), tenant="z", max_tokens=1)


def leave_traces(fleet: Any) -> None:
    """A marker on both tiers, pinned, running, waiting, forked and half way."""
    flush(fleet)
    fleet.tokens([*secret(), 5, 6], max_tokens=2)
    flush(fleet)
    fleet.submit([*secret(), 7], max_tokens=20, fork_seeds=(1, 2), temperature=1.0)
    fleet.submit(secret(40) + prompt(20), max_tokens=20)
    for _ in range(4):
        fleet.step()
    quota = OwnerQuota(Quota(pinned=20))
    fleet.holdings.pin(PinRequest("x", (Region(A, None),), (), array("I", secret()), 60.0, quota), fleet.now)
    fleet.submit(secret(60), max_tokens=20)


def test_after_a_purge_no_byte_of_the_tenants_is_left(world: MakeWorld) -> None:
    fleet = world(num_blocks=64, num_cpu_blocks=256, max_batch_tokens=16)
    fleet.tokens(prompt(40), tenant="b")
    leave_traces(fleet)
    cpu = fleet.runner.mover.blocks
    assert traces(fleet) >= {"bytes", "array"} and holds_marker(cpu.tobytes())  # the search finds what is there
    fleet.scheduler.cancel_owners({A})
    fleet._take()
    fleet.holdings.purge([A])
    fleet.run()
    fleet.tokens(prompt(5), tenant="b", max_tokens=1)  # one step more: wipes go out with the orders of a step
    assert traces(fleet) == set()
    assert not holds_marker(cpu.tobytes())
    theirs = fleet.submit(prompt(40), tenant="b")
    fleet.run()
    facts = fleet.results[theirs].outputs[0].admission
    assert facts.cached_device_tokens + facts.cached_cpu_tokens >= 36


def test_what_leaves_the_cpu_tier_is_overwritten_there(world: MakeWorld) -> None:
    """Evictions, copies that came too late and cancels alike: only what can be found still has content."""
    fleet = world(num_blocks=32, num_cpu_blocks=24)
    rng = random.Random(3)
    for i in range(40):
        fleet.submit(secret(rng.randrange(4, 60)) if i % 3 else prompt(60, seed=i), tenant=rng.choice("ab"))
        for _ in range(rng.randrange(6)):
            fleet.step()
        if i % 4 == 0:
            fleet.cancel(max(fleet.results))
        if i % 5 == 0 and fleet.scheduler.num_running:
            fleet.scheduler._preempt(fleet.scheduler._running[-1])
        if i % 10 == 0:
            fleet.holdings.purge([A])
    fleet.run()
    assert fleet.tiers.cpu.evictions > 20
    fleet.holdings.purge([A])
    fleet.tokens([5], max_tokens=1)
    free = free_blocks(fleet.tiers.cpu)
    assert 0 < len(free) < 24
    assert (fleet.runner.mover.blocks[free] == NEVER_WRITTEN).all()


def test_no_store_and_a_cancelled_prompt_leave_nothing_to_find(world: MakeWorld) -> None:
    fleet = world(num_blocks=64, num_cpu_blocks=64, max_batch_tokens=8)
    fleet.tokens(secret(), no_store=True)
    early = fleet.submit(secret(60), no_store=True)
    fleet.step()
    fleet.cancel(early)
    fleet.tokens(prompt(5), tenant="b", max_tokens=1)
    assert traces(fleet) == set()


# What others see


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tight", [False, True])
def test_what_b_is_told_does_not_depend_on_a(world: MakeWorld, seed: int, tight: bool) -> None:
    """Tokens, cached tokens, copies. Where memory is short, by the floor that is b's own."""

    def play(with_a: bool) -> list[Any]:
        rng, other = random.Random(seed), random.Random(seed + 100)
        fleet = world(num_blocks=96 if tight else 1024, max_batch_tokens=32)
        quota = OwnerQuota(Quota(floor=64)) if tight else None
        ids = []
        for _ in range(30):
            # Three heads with tails: never more of b's than its floor holds.
            tokens = prompt(24, seed=rng.randrange(3)) + prompt(rng.randrange(1, 9), seed=rng.randrange(3))
            ids.append(fleet.submit(tokens, tenant="b", max_tokens=4, quota=quota))
            for _ in range(other.randrange(4) if with_a else 0):
                how: dict[str, Any] = {"fork_seeds": (1,)} if other.random() < 0.2 else {}
                gone = fleet.submit(tokens[: other.randrange(1, len(tokens))] + secret(8), max_tokens=6, **how)
                fleet.step()
                if other.random() < 0.3:
                    fleet.cancel(gone)
            fleet.run()
        said = [next(output.admission for output in fleet.results[i].outputs if output.admission) for i in ids]
        return [
            (fleet.results[i].token_ids, facts.cached_device_tokens, facts.cached_published_tokens, facts.blocks_copied)
            for i, facts in zip(ids, said, strict=True)
        ]

    by_itself = play(with_a=False)
    assert play(with_a=True) == by_itself
    assert any(cached for _, cached, _, _ in by_itself)


# What free memory holds


@pytest.mark.parametrize("num_cpu_blocks", [0, 40])
@pytest.mark.parametrize("seed", range(3))
def test_poison_in_freed_blocks_changes_no_token(world: MakeWorld, seed: int, num_cpu_blocks: int) -> None:
    def play(poisoned: bool) -> list[Any]:
        fleet = world(num_blocks=24, num_cpu_blocks=num_cpu_blocks, max_batch_tokens=16)
        count = 0

        def poison() -> None:
            nonlocal count
            freed = fleet.pool.take_wipes()
            fleet.runner._blocks[freed] = 499
            count += len(freed)

        if poisoned:
            fleet.on_schedule = poison
        work(fleet, random.Random(seed), count=60, vocab=300)
        assert (count > 100) == poisoned
        return [(result.token_ids, result.finish) for result in fleet.results.values()]

    assert play(poisoned=True) == play(poisoned=False)


def work(fleet: Any, rng: random.Random, count: int, vocab: int) -> None:
    """Hits, misses, parts, forks, preemptions and cancels, of two tenants with one text."""
    for _ in range(count):
        tokens = random_tokens(rng.choice((8, 24, 40)), rng.randrange(3), vocab)
        tokens += random_tokens(rng.randrange(1, 14), rng.randrange(5), vocab)
        forks = (1,) if rng.random() < 0.2 else ()
        sequence = fleet.submit(tokens, tenant=rng.choice("ab"), max_tokens=rng.randrange(1, 8), fork_seeds=forks)
        for _ in range(rng.randrange(4)):
            fleet.step()
        if rng.random() < 0.1:
            fleet.cancel(sequence)
    fleet.run()
    assert {result.finish for result in fleet.results.values()} == {Finish.LENGTH, Finish.CANCELLED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("leaks") / "model"
    make_checkpoint(made, "qwen3")
    return made


@pytest.mark.parametrize("cpu_blocks", [0, 24])
def test_nan_in_freed_blocks_of_a_model_reaches_no_token(world: MakeWorld, folder: Path, cpu_blocks: int) -> None:
    def play(value: float) -> list[Any]:
        runner = load(folder, device_blocks=20, cpu_blocks=cpu_blocks)
        fleet = world(runner=runner, max_batch_tokens=32, max_model_len=100)
        runner.cache.blocks.fill_(value)

        def poison() -> None:
            runner.cache.blocks[fleet.pool.take_wipes()] = value

        fleet.on_schedule = poison
        work(fleet, random.Random(1), count=20, vocab=runner.spec.vocab_size)
        answers = [(result.token_ids, result.finish) for result in fleet.results.values()]
        if cpu_blocks:
            assert fleet.tiers.counts.demoted > 0
        runner.close()
        return answers

    poisoned, clean = play(float("nan")), play(0.0)
    assert [finish for _, finish in poisoned] == [finish for _, finish in clean]
    for (found, finish), (expected, _) in zip(poisoned, clean, strict=True):
        # How far a cancelled one came depends on when the tier's thread was done.
        count = min(len(found), len(expected)) if finish == Finish.CANCELLED else len(expected)
        assert found[:count] == expected[:count] and (finish == Finish.CANCELLED or len(found) == count)


def test_a_purge_leaves_zeros_in_the_memory_of_a_models_cpu_tier(world: MakeWorld, folder: Path) -> None:
    runner = load(folder, device_blocks=20, cpu_blocks=64)
    fleet = world(runner=runner, max_batch_tokens=64, max_model_len=100)
    fleet.prefill_tokens_per_s = 1.0
    for tenant, seed in (("a", 1), ("b", 2), ("z", 3), ("z", 4)):
        fleet.tokens(random_tokens(80, seed), tenant=tenant, max_tokens=1)
    rows = runner.mover._store.rows
    count = fleet.holdings.purge([A])
    assert count.cpu_blocks >= 10
    fleet.tokens(random_tokens(3, 5), tenant="z", max_tokens=1)
    free = free_blocks(fleet.tiers.cpu)
    until(lambda: not torch.count_nonzero(rows[free]))
    held = np.setdiff1d(np.arange(64), free).tolist()
    assert all(torch.count_nonzero(rows[block]) for block in held) and held
    again = {tenant: fleet.submit(random_tokens(80, seed), tenant=tenant) for tenant, seed in (("a", 1), ("b", 2))}
    fleet.run()
    facts = {tenant: fleet.results[i].outputs[0].admission for tenant, i in again.items()}
    assert (facts["a"].cached_device_tokens, facts["a"].cached_cpu_tokens) == (0, 0)
    assert facts["b"].cached_cpu_tokens + facts["b"].cached_device_tokens >= 72
    runner.close()


def free_blocks(pool: Any) -> list[int]:
    return [block for block in range(pool.num_blocks) if not pool.references(block) and not pool.is_sealed(block)]


def until(fact: Callable[[], Any]) -> None:
    ends = time.monotonic() + 10
    while not fact():
        assert time.monotonic() < ends
        time.sleep(0.01)
