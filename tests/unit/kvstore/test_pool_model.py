"""The pool and its tables against a model of token tuples: random sequences that share, grow, fail, end and resume.

The model knows paths: the (scope, tokens) of a block and of all before it. Every KV position remembers the tokens that
were computed into it, so any wrong reuse, late write or lost block shows as a wrong position.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockId, BlockKey, BrokenInvariant, WorkerId
from kvstore.block_key import block_keys
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.memory_index import MemoryIndex
from kvstore.scope import Region, scope_root

SIZE = 2
NUM_BLOCKS = 14
WORKER = WorkerId("w")
ROOTS = {name: scope_root(b"s", b"model", name, block_size=SIZE) for name in ("public", "tenant:a", "tenant:b")}
REGIONS = [
    [Region(ROOTS["tenant:a"], None)],
    [Region(ROOTS["tenant:b"], None)],
    [Region(ROOTS["public"], 5), Region(ROOTS["tenant:a"], None)],
    [Region(ROOTS["public"], 5), Region(ROOTS["tenant:b"], None)],
    [Region(ROOTS["public"], 1), Region(ROOTS["tenant:b"], None)],
]

Path = tuple[tuple[bytes, tuple[int, ...]], ...]


@dataclass
class Running:
    """A sequence in the test: its table and what the model expects of it."""

    table: BlockTable
    regions: list[Region]
    tokens: array[int]
    no_store: bool
    computed: int = 0
    sealed: int = 0
    broken: bool = False
    stand_ins: list[Path] = field(default_factory=list)

    def paths(self) -> list[Path]:
        """The path of each full block of the tokens."""
        path: Path = ()
        found = []
        for first in range(0, len(self.tokens) // SIZE * SIZE, SIZE):
            path = (*path, (root_at(self.regions, first), tuple(self.tokens[first : first + SIZE])))
            found.append(path)
        return found

    def content(self, position: int) -> bytes:
        """What KV at a position must be: a function of the scopes and of all tokens up to it."""
        last = position // SIZE * SIZE
        scopes = [root_at(self.regions, first) for first in range(0, last + SIZE, SIZE)]
        return hashlib.blake2b(repr((scopes, self.tokens[: position + 1])).encode(), digest_size=8).digest()


def root_at(regions: list[Region], first: int) -> bytes:
    """The scope of the block that begins at position `first`."""
    return next(region.root for region in regions if region.end is None or first + SIZE <= region.end)


class PoolMachine(RuleBasedStateMachine):
    KEY_BITS: tuple[int, ...] = (128,)

    @initialize(data=st.data())
    def begin_with(self, data: st.DataObject) -> None:
        self.begin(data.draw(st.sampled_from(self.KEY_BITS)))

    def begin(self, key_bits: int) -> None:
        self.key_bits = key_bits
        self.pool = BlockPool(NUM_BLOCKS, SIZE, key_bits=key_bits)
        self.running: list[Running] = []
        self.kv: list[list[bytes]] = [[b"poison"] * SIZE for _ in range(NUM_BLOCKS)]
        self.resident: dict[BlockKey, Path] = {}
        self.cached: list[BlockKey] = []  # unreferenced, in order of eviction
        self.generations = [0] * NUM_BLOCKS
        self.index = MemoryIndex()
        self.collisions = 0
        self.num_stand_ins = 0

    # What a sequence does.

    @precondition(lambda self: len(self.running) < 6)
    @rule(
        regions=st.sampled_from(REGIONS),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        no_store=st.sampled_from([False, False, False, True]),
        first=st.integers(0, 14),
    )
    def arrive(self, regions: list[Region], tokens: list[int], no_store: bool, first: int) -> None:
        table = BlockTable(self.pool, regions, no_store=no_store)
        running = Running(table, regions, array("I", tokens), no_store)
        self.attach(running)
        self.running.append(running)
        if first:
            self.compute(len(self.running) - 1, first, tokens[0])

    @precondition(lambda self: 0 < len(self.running) < 6)
    @rule(
        of=st.integers(0, 5),
        cut=st.integers(0, 14),
        tail=st.lists(st.integers(0, 1), min_size=1, max_size=6),
        regions=st.none() | st.sampled_from(REGIONS),
        first=st.integers(0, 14),
    )
    def arrive_alike(self, of: int, cut: int, tail: list[int], regions: list[Region] | None, first: int) -> None:
        """A sequence that begins like another one and goes on in its own way, perhaps of another tenant."""
        other = self.running[of % len(self.running)]
        self.arrive(regions or other.regions, [*other.tokens[:cut], *tail][:20], False, first)

    @precondition(lambda self: self.running)
    @rule(of=st.integers(0, 5), count=st.integers(1, 7), token=st.integers(0, 1))
    def compute(self, of: int, count: int, token: int) -> None:
        running = self.running[of % len(self.running)]
        end = min(running.computed + count, len(running.tokens))
        blocks_before = list(running.table.block_ids)
        needed = -(-end // SIZE) - len(blocks_before)
        available, free = self.pool.num_available, self.pool.num_free
        granted = running.table.reserve(end)
        assert granted == (needed <= available)
        if not granted:
            assert running.table.block_ids == blocks_before and self.pool.num_available == available
            return
        assert running.table.block_ids[: len(blocks_before)] == blocks_before
        for block in running.table.block_ids[len(blocks_before) :]:
            self.kv[block] = [b"poison"] * SIZE
            assert self.pool.generation(BlockId(block)) > self.generations[block]
        for key in self.cached[: max(0, needed - free)]:
            del self.resident[key]
        del self.cached[: max(0, needed - free)]
        self.write(running, end)
        if running.computed == len(running.tokens):
            running.tokens.append(token)

    def write(self, running: Running, end: int) -> None:
        for position in range(running.computed, end):
            block = BlockId(running.table.block_ids[position // SIZE])
            assert self.pool.references(block) == 1 and not self.pool.is_sealed(block)
            self.kv[block][position % SIZE] = running.content(position)
        running.computed = end
        running.table.seal(running.tokens, end)
        self.model_seal(running)

    def model_seal(self, running: Running) -> None:
        if running.no_store:
            return
        keys = self.keys(running)
        paths = running.paths()
        while running.sealed < running.computed // SIZE and not running.broken:
            key, path = keys[running.sealed], paths[running.sealed]
            if self.resident.setdefault(key, path) != path:
                running.broken = True
                self.collisions += 1
                return
            block = BlockId(running.table.block_ids[running.sealed])
            if not self.pool.is_sealed(block):
                running.stand_ins.append(path)
                self.num_stand_ins += 1
                if key in self.cached:
                    self.cached.remove(key)
            running.sealed += 1

    def keys(self, running: Running) -> list[BlockKey]:
        return block_keys(running.regions, running.tokens, SIZE, key_bits=self.key_bits)

    def attach(self, running: Running) -> None:
        """A hit is the longest resident prefix of the model, with one token left to compute."""
        expected = 0
        for key, path in zip(self.keys(running)[: (len(running.tokens) - 1) // SIZE], running.paths(), strict=False):
            if key in self.resident and self.resident[key] != path:
                self.collisions += 1
            if self.resident.get(key) != path:
                break
            expected += 1
            if key in self.cached:
                self.cached.remove(key)
        got = running.table.attach_prefix(running.tokens, len(running.tokens) - 1)
        assert got == expected * SIZE == len(running.table.block_ids) * SIZE
        published = [path for path in running.paths()[:expected] if path[-1][0] != running.regions[-1].root]
        assert running.table.cached_published == len(published) * SIZE
        running.computed = got
        running.sealed = expected

    @precondition(lambda self: self.running)
    @rule(of=st.integers(0, 5))
    def leave(self, of: int) -> None:
        self.release(self.running.pop(of % len(self.running)))

    @precondition(lambda self: self.running)
    @rule(of=st.integers(0, 5))
    def preempt_and_resume(self, of: int) -> None:
        running = self.running[of % len(self.running)]
        self.release(running)
        self.attach(running)

    def release(self, running: Running) -> None:
        keys, paths = self.keys(running), running.paths()
        held: Counter[Path] = Counter()
        for other in self.running:
            if other is not running:
                held.update(self.holds(other))
        running.table.release()
        for index in reversed(range(running.sealed)):
            if not held[paths[index]]:
                self.cached.append(keys[index])
        running.computed = running.sealed = 0
        running.broken = False
        running.stand_ins = []
        assert running.table.block_ids == [] and running.table.cached_published == 0
        running.table.release()  # once more does nothing

    def holds(self, running: Running) -> list[Path]:
        return running.paths()[: running.sealed]

    # What others do.

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        for key in self.cached:
            del self.resident[key]
        self.cached.clear()

    @rule()
    def publish(self) -> None:
        """Events may be taken at any time; between two times only the net change matters."""
        self.index.apply(WORKER, 1, self.pool.take_events())
        assert self.index.keys_of(WORKER) == set(self.resident)
        assert self.index.num_blocks(WORKER) == len(self.resident)

    @rule(block=st.integers(-1, NUM_BLOCKS))
    def misuse(self, block: int) -> None:
        """Giving back or taking what is not held is refused and changes nothing, also in the middle of a list."""
        outside = not 0 <= block < NUM_BLOCKS
        if not outside and self.pool.references(BlockId(block)):
            return
        before = digest(self.pool)
        others = [BlockId(other) for running in self.running for other in running.table.block_ids]
        with pytest.raises(BrokenInvariant):
            self.pool.release([*others, BlockId(block), *others])
        if outside or not self.pool.is_sealed(BlockId(block)):
            with pytest.raises(BrokenInvariant):
                self.pool.acquire([*others, BlockId(block)])
        assert digest(self.pool) == before

    # What always holds.

    @invariant()
    def pool_is_sound(self) -> None:
        self.pool.check(deep=True)
        pool = self.pool
        assert pool.num_free + pool.num_cached + pool.num_referenced == NUM_BLOCKS
        assert pool.num_free + pool.num_cached == pool.num_available
        assert pool.key_collisions == self.collisions

    @invariant()
    def references_are_the_holders(self) -> None:
        by_path = {path: key for key, path in self.resident.items()}
        held = Counter(BlockId(block) for running in self.running for block in running.table.block_ids)
        held.update(self.pool._sealed_by_key[by_path[path]] for running in self.running for path in running.stand_ins)
        assert all(self.pool.references(BlockId(block)) == held[BlockId(block)] for block in range(NUM_BLOCKS))

    @invariant()
    def sealed_is_the_models_set(self) -> None:
        assert set(self.pool.sealed_keys()) == set(self.resident)
        queue = [self.pool._keys[block] for block in self.pool._queue]
        assert [key for key in queue if key is not None] == self.cached
        paths = set(self.resident.values())
        assert all(len(path) == 1 or path[:-1] in paths for path in paths)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for running in self.running:
            for position in range(running.computed):
                block = running.table.block_ids[position // SIZE]
                assert self.kv[block][position % SIZE] == running.content(position)

    @invariant()
    def generations_grow(self) -> None:
        now = [self.pool.generation(BlockId(block)) for block in range(NUM_BLOCKS)]
        assert all(new >= old for new, old in zip(now, self.generations, strict=True))
        self.generations = now

    def teardown(self) -> None:
        while self.running:
            self.release(self.running.pop())
        assert self.pool.num_referenced == 0
        self.clear()
        self.publish()
        assert self.pool.num_free == NUM_BLOCKS and not self.resident


class CollidingPoolMachine(PoolMachine):
    """The same with keys of 8 bits and fewer: blocks collide all the time."""

    KEY_BITS = (8, 4, 2)


def digest(pool: BlockPool) -> bytes:
    """Everything that a pool will ever base a decision on."""
    state = repr((
        list(pool._queue), list(pool._references), list(pool._generations), sorted(pool._sealed_by_key.items()),
        pool.num_free, pool.num_cached, pool._tokens, pool._roots, list(pool._parents),
    ))  # fmt: skip
    return hashlib.blake2b(state.encode()).digest()


_SETTINGS = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

TestPool = PoolMachine.TestCase
TestPool.settings = _SETTINGS
TestCollidingPool = CollidingPoolMachine.TestCase
TestCollidingPool.settings = _SETTINGS


@pytest.mark.parametrize("key_bits", [128, 8, 3])
@pytest.mark.parametrize("seed", range(4))
def test_long_walk(key_bits: int, seed: int) -> None:
    """The same rules and invariants over far more steps than hypothesis takes in one run."""
    rng = random.Random(seed)
    machine = PoolMachine()
    machine.begin(key_bits)
    for _ in range(2000):
        step(machine, rng)
        machine.pool_is_sound()
        machine.references_are_the_holders()
        machine.sealed_is_the_models_set()
        machine.every_sequence_reads_its_own_tokens()
        machine.generations_grow()
    assert machine.pool.evictions > 30 and machine.num_stand_ins > 5
    assert (machine.collisions > 10) == (key_bits < 128)
    machine.teardown()


def step(machine: PoolMachine, rng: random.Random) -> None:
    if len(machine.running) < rng.randrange(1, 7):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 15))]
        if machine.running and rng.random() < 0.6:
            regions = rng.choice([None, *REGIONS])
            machine.arrive_alike(rng.randrange(6), rng.randrange(15), tokens[:6], regions, rng.randrange(15))
        else:
            machine.arrive(rng.choice(REGIONS), tokens, rng.random() < 0.1, rng.randrange(15))
        return
    draw = rng.random()
    if draw < 0.55:
        machine.compute(rng.randrange(6), rng.randrange(1, 8), rng.randrange(2))
    elif draw < 0.75:
        machine.leave(rng.randrange(6))
    elif draw < 0.82:
        machine.preempt_and_resume(rng.randrange(6))
    elif draw < 0.92:
        machine.publish()
    elif draw < 0.99:
        machine.misuse(rng.randrange(-1, NUM_BLOCKS + 1))
    else:
        machine.clear()


def test_same_operations_same_state() -> None:
    def run() -> bytes:
        rng = random.Random(11)
        pool = BlockPool(40, SIZE, key_bits=16)
        tables: list[BlockTable] = []
        for _ in range(400):
            prompt = array("I", [rng.randrange(2) for _ in range(rng.randrange(2, 20))])
            table = BlockTable(pool, rng.choice(REGIONS))
            table.attach_prefix(prompt, len(prompt) - 1)
            if table.reserve(len(prompt)):
                table.seal(prompt, len(prompt))
            tables.append(table)
            if len(tables) > 3:
                tables.pop(rng.randrange(4)).release()
        return digest(pool)

    assert run() == run()
