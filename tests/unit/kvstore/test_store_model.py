"""The block store against its model: sequences that share, fork, wait, grow, slide, fail, load, end and resume."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockId, BrokenInvariant
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from tests.unit.kvstore.store_model import QUOTAS, REGIONS, SIZE, Store, digest

MAX_RUNNING = 6
some = st.integers(0, 5)
token = st.integers(0, 1)


class StoreMachine(RuleBasedStateMachine):
    """One tier, whole keys; the subclasses add what makes it harder."""

    KEY_BITS: tuple[int, ...] = (128,)
    CPU_BLOCKS: tuple[int, ...] = (0,)

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.store = Store(
            key_bits=data.draw(st.sampled_from(self.KEY_BITS)),
            cpu_blocks=data.draw(st.sampled_from(self.CPU_BLOCKS)),
            policy=data.draw(st.sampled_from(["slru", "lru", "fifo"])),
        )

    @precondition(lambda self: len(self.store.running) < MAX_RUNNING)
    @rule(regions=st.sampled_from(REGIONS), tokens=st.lists(token, min_size=1, max_size=14), no_store=st.booleans())
    def arrive(self, regions: tuple, tokens: list[int], no_store: bool) -> None:
        self.store.arrive(regions, tokens, no_store and len(tokens) % 2 == 0)

    @precondition(lambda self: 0 < len(self.store.running) < MAX_RUNNING)
    @rule(of=some, cut=st.integers(0, 14), tail=st.lists(token, min_size=1, max_size=6),
          regions=st.none() | st.sampled_from(REGIONS))  # fmt: skip
    def arrive_alike(self, of: int, cut: int, tail: list[int], regions: tuple | None) -> None:
        self.store.arrive_alike(of, cut, tail, regions)

    @precondition(lambda self: self.store.running)
    @rule(of=some, count=st.integers(1, 7), token=token)
    def compute(self, of: int, count: int, token: int) -> None:
        self.store.compute(of, count, token)

    @precondition(lambda self: self.store.running)
    @rule(of=some, count=st.integers(4, 14), token=token)
    def compute_much(self, of: int, count: int, token: int) -> None:
        self.store.compute(of, count, token)

    @precondition(lambda self: 0 < len(self.store.running) < MAX_RUNNING)
    @rule(of=some, tail=token)
    def fork(self, of: int, tail: int) -> None:
        self.store.fork(of, tail)

    @precondition(lambda self: self.store.running)
    @rule(of=some, window=st.integers(2, 6))
    def slide(self, of: int, window: int) -> None:
        self.store.slide(of, window)

    @precondition(lambda self: self.store.running)
    @rule(of=some)
    def leave(self, of: int) -> None:
        self.store.leave(of)

    @precondition(lambda self: self.store.running)
    @rule(of=some)
    def preempt_and_resume(self, of: int) -> None:
        self.store.preempt_and_resume(of)

    @rule(name=some, quota=st.integers(0, len(QUOTAS) - 1), in_cpu=st.booleans())
    def set_quota(self, name: int, quota: int, in_cpu: bool) -> None:
        self.store.set_quota(name, quota, in_cpu)

    @precondition(lambda self: self.store.running)
    @rule(of=some, until=st.integers(0, 9))
    def pin(self, of: int, until: int) -> None:
        self.store.pin(of, until)

    @rule(name=some)
    def purge(self, name: int) -> None:
        self.store.purge(name)

    @rule()
    def clear(self) -> None:
        self.store.clear()

    @rule()
    def publish(self) -> None:
        self.store.publish()

    @rule()
    def crash(self) -> None:
        self.store.crash()

    @rule(block=st.integers(-1, 14))
    def misuse(self, block: int) -> None:
        misuse(self.store, block)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "store"):
            self.store.check()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.stop()


class CollidingMachine(StoreMachine):
    """Keys of 8 bits and fewer: blocks collide all the time."""

    KEY_BITS = (8, 4, 2)


class TieredMachine(StoreMachine):
    """Two tiers, and a copy stream that answers late, out of order, twice, with errors and flipped bytes."""

    KEY_BITS = (128, 128, 4)
    CPU_BLOCKS = (4, 12, 40)

    @rule()
    def copy_stream(self) -> None:
        self.store.copy_stream()

    @rule(which=some, fails=st.sampled_from([False, False, False, True]))
    def answer(self, which: int, fails: bool) -> None:
        self.store.answer(which, fails)

    @rule()
    def answer_all(self) -> None:
        self.store.copy_stream()
        while self.store.answers:
            self.store.answer(0, False)

    @rule(block=st.integers(0, 40))
    def corrupt(self, block: int) -> None:
        self.store.corrupt(block)

    @rule(loads=st.booleans())
    def set_rates(self, loads: bool) -> None:
        self.store.set_rates(loads)


def misuse(store: Store, block: int) -> None:
    """Giving back or taking what is not held is refused and changes nothing, also in the middle of a list."""
    pool = store.pool
    outside = not 0 <= block < pool.num_blocks
    if not outside and pool.references(BlockId(block)):
        return
    before = digest(pool)
    others = [BlockId(other) for running in store.running for other in running.table.block_ids if other >= 0]
    with pytest.raises(BrokenInvariant):
        pool.release([*others, BlockId(block), *others])
    if outside or not pool.is_sealed(BlockId(block)):
        with pytest.raises(BrokenInvariant):
            pool.acquire([*others, BlockId(block)])
    assert digest(pool) == before


_SETTINGS = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

TestStore = StoreMachine.TestCase
TestStore.settings = _SETTINGS
TestCollidingStore = CollidingMachine.TestCase
TestCollidingStore.settings = _SETTINGS
TestTieredStore = TieredMachine.TestCase
TestTieredStore.settings = _SETTINGS


def walk(store: Store, rng: random.Random, steps: int, *, check_every: int = 1) -> None:
    """The same rules over far more steps than hypothesis takes in one run."""
    for number in range(steps):
        step(store, rng)
        if number % check_every == 0:
            store.check()
        else:
            store.learn()
            store.poison()


def step(store: Store, rng: random.Random) -> None:
    most = 2 if store.cpu_blocks else MAX_RUNNING
    if len(store.running) < rng.randrange(1, most + 1):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 15))]
        if store.cpu_blocks and rng.random() < 0.6:
            store.arrive(rng.choice(REGIONS[:3]), rng.choice(PROMPTS), rng.random() < 0.05)
        elif store.running and rng.random() < 0.6:
            regions = rng.choice([None, *REGIONS])
            store.arrive_alike(rng.randrange(6), rng.randrange(15), tokens[:6], regions)
        else:
            store.arrive(rng.choice(REGIONS), tokens, rng.random() < 0.1)
        return
    of = rng.randrange(6)
    rare: list[Callable[[], object]] = [
        lambda: store.set_quota(of, rng.randrange(len(QUOTAS)), rng.random() < 0.3),
        lambda: store.set_quota(of, 0, rng.random() < 0.3),
        lambda: [store.set_quota(name, 0, False) for name in range(4)],
        lambda: store.pin(of, rng.randrange(10)),
        lambda: rng.random() < 0.3 and store.purge(of),
        lambda: store.slide(of, rng.randrange(2, 7)),
        lambda: store.set_rates(rng.random() < 0.7),
        lambda: store.corrupt(rng.randrange(40)),
        lambda: misuse(store, rng.randrange(-1, 15)),
        lambda: rng.random() < 0.3 and store.clear(),
        lambda: rng.random() < 0.3 and store.crash(),
    ]
    often: list[tuple[float, Callable[[], object]]] = [
        (0.39, lambda: store.compute(of, rng.randrange(1, 8), rng.randrange(2))),
        (0.12, lambda: store.leave(of)),
        (0.05, lambda: store.preempt_and_resume(of)),
        (0.04, lambda: len(store.running) < MAX_RUNNING and store.fork(of, rng.randrange(2))),
        (0.13, store.copy_stream),
        (0.20, lambda: store.answer(of, rng.random() < 0.05)),
        (0.03, store.publish),
        (1.0, lambda: rng.choice(rare)()),
    ]
    draw = rng.random()
    for share, action in often:
        draw -= share
        if draw < 0:
            action()
            return


# Key bits, CPU blocks, policy.
PROFILES = [(128, 0, "slru"), (128, 20, "slru"), (128, 60, "lru"), (8, 0, "fifo"), (3, 12, "slru"), (128, 6, "fifo")]
PROMPTS = [[number >> bit & 1 for bit in range(14)][: 10 + number % 5] for number in (0, 1, 5, 21, 85, 86, 1023, 4095)]


@pytest.mark.parametrize(("key_bits", "cpu_blocks", "policy"), PROFILES)
def test_long_walk(key_bits: int, cpu_blocks: int, policy: str) -> None:
    counts: Counter[str] = Counter()
    for seed in range(2):
        store = Store(10 + 8 * seed, key_bits=key_bits, cpu_blocks=cpu_blocks, policy=policy)
        walk(store, random.Random(seed), 2500)
        counts += store.counts
        store.stop()
    happened = {"waits", "parts", "refused", "copied", "forks", "crashes", "pinned", "ends"}
    assert set(counts) >= happened | ({"loaded", "holes"} if cpu_blocks else set())


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("key_bits", "cpu_blocks", "policy"), PROFILES)
def test_very_long_walk(key_bits: int, cpu_blocks: int, policy: str) -> None:
    """10^6 operations over all profiles."""
    store = Store(key_bits=key_bits, cpu_blocks=cpu_blocks, policy=policy)
    walk(store, random.Random(99), 1_000_000 // len(PROFILES) + 1, check_every=5)
    store.stop()


def test_same_operations_same_state() -> None:
    def run() -> bytes:
        store = Store(cpu_blocks=12, key_bits=16)
        walk(store, random.Random(11), 600, check_every=100)
        assert store.tiers is not None
        return digest(store.pool) + digest(store.tiers.cpu)

    assert run() == run()


def test_same_operations_same_state_of_a_pool_alone() -> None:
    def run() -> bytes:
        rng = random.Random(11)
        pool = BlockPool(40, SIZE, key_bits=16)
        tables: list[BlockTable] = []
        for _ in range(400):
            prompt = array("I", [rng.randrange(2) for _ in range(rng.randrange(2, 20))])
            table = BlockTable(pool, rng.choice(REGIONS))
            cached = table.attach_prefix(prompt, len(prompt) - 1)
            if table.reserve(len(prompt)) and table.prepare_write(cached, len(prompt)):
                table.take_copies()
                table.copies_done()
                table.seal(prompt, len(prompt))
            tables.append(table)
            if len(tables) > 3:
                tables.pop(rng.randrange(4)).release()
        return digest(pool)

    assert run() == run()
