"""The block store beside a model of it, in dictionaries of token tuples: what every rule of the tests drives.

A path is the (scope, tokens) of a block and of all before it; that of a published end has fewer tokens. Every KV
position remembers the tokens that were computed into it and the scope it was computed for, in both tiers, and free
memory is poison: a wrong reuse, copy, load or late write shows as a wrong position.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass

import pytest
from xxhash import xxh3_128_digest

from kvstore import audit
from kvstore.block import NO_BLOCK, BlockId, BlockKey, WorkerId
from kvstore.block_key import block_keys
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.events import CPU, DEVICE
from kvstore.flights import Wait
from kvstore.memory_index import MemoryIndex
from kvstore.pins import Pins
from kvstore.quota import Owner, Quota
from kvstore.scope import Region, scope_root
from kvstore.tiers import Load, Tiers, cpu_pool
from kvstore.transfers import Demote, Promote, Rates

SIZE = 3
WORKER = WorkerId("w")
NAMES = ("public", "group", "tenant:a", "tenant:b")
PUBLIC, GROUP, A, B = (scope_root(b"s", b"model", name, block_size=SIZE) for name in NAMES)
REGIONS = [
    (Region(A, None),),
    (Region(B, None),),
    (Region(PUBLIC, 5), Region(A, None)),
    (Region(PUBLIC, 5), Region(B, None)),
    (Region(PUBLIC, 1), Region(B, None)),
    (Region(PUBLIC, 4), Region(GROUP, 5), Region(A, None)),
    (Region(PUBLIC, None),),
]
QUOTAS = [None, Quota(), Quota(floor=4), Quota(ceiling=3), Quota(floor=2, ceiling=6), Quota(floor=3, pinned=3)]
LOADS, COMPUTES = Rates(prefill_token_s=1.0), Rates(load_block_s=9.0, prefill_token_s=1.0)

Path = tuple[tuple[bytes, tuple[int, ...]], ...]
Entry = tuple[str, bytes]  # digest of the tokens up to a position; scope of the block it was computed in
POISON: Entry = ("poison", b"")


@dataclass
class Running:
    """A sequence in the test: its table and what the model expects of it."""

    table: BlockTable
    regions: tuple[Region, ...]
    tokens: array[int]
    no_store: bool
    computed: int = 0
    load: Load | None = None
    wait: Wait | None = None
    window: int = 0

    def paths(self) -> list[Path]:
        """The path of each full block of the tokens."""
        path: Path = ()
        found = []
        for first in range(0, len(self.tokens) // SIZE * SIZE, SIZE):
            path = (*path, (root_at(self.regions, first), tuple(self.tokens[first : first + SIZE])))
            found.append(path)
        return found

    def ends(self) -> list[int]:
        """Where published heads end inside a block."""
        return [region.end for region in self.regions if region.end is not None and region.end % SIZE]

    def entry(self, position: int) -> Entry:
        """What KV at a position must be, if this sequence computed it."""
        return digest_of(self.tokens[: position + 1]), root_at(self.regions, position // SIZE * SIZE)


def digest_of(tokens: array[int]) -> str:
    return hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()


def root_at(regions: tuple[Region, ...], first: int) -> bytes:
    """The scope of the block that begins at position `first`."""
    return next(region.root for region in regions if region.end is None or first + SIZE <= region.end)


class Store:
    """Both tiers, their memories, the copy stream, the sequences, and the model of what is resident."""

    def __init__(self, num_blocks: int = 14, cpu_blocks: int = 0, key_bits: int = 128, policy: str = "slru") -> None:
        self.num_blocks, self.cpu_blocks, self.key_bits, self.policy = num_blocks, cpu_blocks, key_bits, policy
        self.index = MemoryIndex()
        self.epoch = 0
        self.counts: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        """A new life: nothing is cached and nothing runs."""
        self.epoch += 1
        self.pool = BlockPool(self.num_blocks, SIZE, key_bits=self.key_bits, policy=self.policy)
        self.tiers: Tiers | None = None
        if self.cpu_blocks:
            cpu = cpu_pool(self.pool, self.cpu_blocks)
            self.tiers = Tiers(self.pool, cpu, rates=LOADS, max_demotions=4)
        self.pins = Pins(self.pool)
        self.running: list[Running] = []
        self.kv: list[list[Entry]] = [[POISON] * SIZE for _ in range(self.num_blocks)]
        self.cpu_kv: list[list[Entry]] = [[POISON] * SIZE for _ in range(self.cpu_blocks)]
        self.answers: list[tuple[Demote | Promote, int]] = []
        self.old_answers: list[Demote | Promote] = []
        self.resident: dict[int, dict[BlockKey, Path]] = {DEVICE: {}, CPU: {}}
        self.known: dict[BlockKey, set[Path]] = {}
        self.generations = [0] * self.num_blocks
        self.publishers: dict[bytes, bytes] = {}

    # What a sequence does

    def arrive(self, regions: tuple[Region, ...], tokens: list[int], no_store: bool = False) -> None:
        running = Running(BlockTable(self.pool, regions, no_store=no_store), regions, array("I", tokens), no_store)
        self.running.append(running)
        self.attach(running)

    def arrive_alike(self, of: int, cut: int, tail: list[int], regions: tuple[Region, ...] | None) -> None:
        """A sequence that begins like another one and goes on in its own way, perhaps of another tenant."""
        other = self.running[of % len(self.running)]
        self.arrive(regions or other.regions, [*other.tokens[:cut], *tail][:20])

    def attach(self, running: Running) -> None:
        """A hit is the longest common prefix with what is resident and may be read, one token left to compute."""
        limit = len(running.tokens) - 1
        full, part = self.expected(running, limit)
        table = running.table
        if self.tiers is not None:
            attached = self.tiers.attach_prefix(table, running.tokens, limit)
            got, running.load = attached.num_tokens, attached.load
        else:
            got = table.attach_prefix(running.tokens, limit)
        assert got <= full * SIZE + part
        if table.pending is not None:
            assert got == full * SIZE or (got == 0 and self.has_floors())
            assert self.leads_on(running, got // SIZE)
            self.counts["waits"] += 1
            running.wait = table.pending
            table.release()
            return
        if not self.has_floors() and running.load is None:
            assert got >= full * SIZE
            assert got == full * SIZE + part or self.pool.num_available < 2
        self.counts["parts"] += got % SIZE > 0
        self.counts["loads"] += running.load is not None
        running.computed = got
        self.check_published(running, got)
        self.copy_now(running)

    def expected(self, running: Running, limit: int) -> tuple[int, int]:
        """(full blocks, tokens of the next one) that are resident on the device and may be read: a search of all."""
        by_path = set(self.resident[DEVICE].values())
        full = 0
        paths = running.paths()
        while full < limit // SIZE and paths[full] in by_path:
            full += 1
        start = full * SIZE
        parent = paths[full - 1] if full else ()
        best = 0
        for path in by_path:
            if path[:-1] != parent:
                continue
            for before, region in zip((None, *running.regions), running.regions, strict=False):
                begins = before.end if before is not None else 0
                if region.root == path[-1][0] and begins < start + SIZE:
                    end = min(limit, start + SIZE, region.end if region.end is not None else limit)
                    wanted = tuple(running.tokens[start:end])
                    same = [one == other for one, other in zip(wanted, path[-1][1], strict=False)]
                    best = max(best, same.index(False) if False in same else len(same))
        return full, best

    def leads_on(self, running: Running, full: int) -> bool:
        """Whether another sequence holds the same prefix and goes on with the same block."""
        others = [other for other in self.running if other is not running and other.table.block_ids]
        paths = running.paths()
        if full < len(paths) and any(paths[full] in other.paths() for other in others):
            return True
        ends = [end for end in running.ends() if full * SIZE < end < (full + 1) * SIZE and end <= len(running.tokens)]
        return any(
            end in other.ends() and running.tokens[:end] == other.tokens[:end] and paths[:full] == other.paths()[:full]
            for end in ends
            for other in others
        )

    def check_published(self, running: Running, got: int) -> None:
        last = running.regions[-1].root
        ours = 0 if len(running.regions) == 1 else sum(
            SIZE for first in range(0, got // SIZE * SIZE, SIZE) if root_at(running.regions, first) != last
        )  # fmt: skip
        assert ours <= running.table.cached_published <= ours + got % SIZE

    def copy_now(self, running: Running) -> None:
        """Carry out copy orders: only what may be read is read."""
        for source, target, num_tokens in running.table.take_copies():
            assert self.pool.references(source) > 0 and self.pool.is_writable(target)
            index = running.table.block_ids.index(target)
            for offset in range(num_tokens):
                digest, scope = self.kv[source][offset]
                position = index * SIZE + offset
                assert self.may_read(running, position, scope), "read across scopes"
                self.kv[target][offset] = (digest, root_at(running.regions, index * SIZE))
        running.table.copies_done()

    def is_idle(self, running: Running) -> bool:
        return running.wait is None and (running.load is None or running.load.done)

    def compute(self, of: int, count: int, token: int) -> None:
        running = self.running[of % len(self.running)]
        if running.wait is not None:
            self.try_again(running)
        if not self.is_idle(running):
            return
        self.finish_load(running)
        start, end = running.computed, min(running.computed + count, len(running.tokens))
        if count % 4:  # most callers stop at a published end
            end = running.table.share_end(running.tokens, start, end)
        table, blocks_before = running.table, list(running.table.block_ids)
        needed = -(-end // SIZE) - len(blocks_before)
        expected = needed <= 0 or self.may_hold(running, needed)
        granted = table.reserve(end)
        assert granted == expected
        if not granted:
            self.counts["refused"] += 1
            assert table.block_ids == blocks_before
            return
        fresh = [BlockId(block) for block in table.block_ids[len(blocks_before) :]]
        assert all(self.pool.generation(block) > self.generations[block] for block in fresh)
        shared = [
            i for i in range(start // SIZE, -(-end // SIZE)) if not self.pool.is_writable(BlockId(table.block_ids[i]))
        ]
        expected = not shared or self.may_hold(running, len(shared))
        assert table.prepare_write(start, end) == expected
        if not expected:
            return
        self.counts["copied"] += len(shared)
        self.copy_now(running)
        if start < end:
            self.keep_own(running, start)
        for position in range(start, end):
            block = BlockId(table.block_ids[position // SIZE])
            assert self.pool.references(block) == 1 and not self.pool.is_sealed(block)
            self.kv[block][position % SIZE] = running.entry(position)
        running.computed = end
        self.seal(running)
        if running.window:
            self.counts["holes"] += table.release_before(end - running.window, sinks=1)
        if running.computed == len(running.tokens) < 24:
            running.tokens.append(token)

    def keep_own(self, running: Running, start: int) -> None:
        """The block of a published end that was purged goes on as the private one of whoever held it."""
        first = start // SIZE * SIZE
        for position in range(first, start):
            block = running.table.block_ids[first // SIZE]
            digest, scope = self.kv[block][position % SIZE]
            assert self.may_read(running, position, scope)
            self.kv[block][position % SIZE] = (digest, root_at(running.regions, first))

    def seal(self, running: Running) -> None:
        """What ends where a published head does is there for others from now on, and holds nothing behind it."""
        table, end = running.table, running.computed
        sealing = table._sealing
        is_end = table.seal(running.tokens, end)
        if end not in running.ends():
            assert not is_end
            return
        root = next(region.root for region in running.regions if region.end == end)
        first = end // SIZE * SIZE
        block = BlockId(table.block_ids[first // SIZE])
        assert is_end == (self.pool.is_sealed(block) and not running.no_store) or not sealing
        if is_end:
            self.counts["ends"] += 1
            assert [digest for digest, _ in self.kv[block][: end - first]] == [
                running.entry(position)[0] for position in range(first, end)
            ]
            self.kv[block] = [(digest, root) for digest, _ in self.kv[block][: end - first]]
            self.kv[block] += [POISON] * (first + SIZE - end)
        parent, room = table._tip, is_end or self.pool.num_available  # after full blocks were sealed
        if table._sealing and room and self.key_bits == 128 and (parent == NO_BLOCK or self.pool.is_sealed(parent)):
            wanted, number = running.tokens[first:end].tobytes(), self.pool.number(parent)
            children = self.pool.contents.children.of(number)
            held = [self.pool.contents.tokens[i] for i in children if self.pool.contents.roots[i] == root]
            assert any(tokens[: len(wanted)] == wanted for tokens in held)

    def try_again(self, running: Running) -> None:
        assert running.wait is not None and running.table.block_ids == []
        if running.wait.ready:
            running.wait = None
            self.attach(running)

    def finish_load(self, running: Running) -> None:
        if running.load is not None:
            running.computed = running.load.start + running.load.num_loaded
            self.counts["loaded"] += running.load.num_loaded
            running.load = None

    def may_hold(self, running: Running, count: int) -> bool:
        """Whether the pool has to give so many blocks: computed from every block's state."""
        if count > self.num_blocks - sum(self.pool.references(BlockId(block)) > 0 for block in range(self.num_blocks)):
            return False
        held: Counter[Owner] = Counter()
        for block, owner in enumerate(self.pool._owners):
            if owner is not None and self.pool.references(BlockId(block)):
                held[owner] += 1
        holders = [other for other in self.running if other.table.block_ids]
        owner = self.pool._ledger.owner(running.regions[-1].root)
        if not self.unmet(held) or holders in ([], [running]):
            return True
        held[owner] += count
        return sum(held.values()) + self.unmet(held) <= self.num_blocks

    def unmet(self, held: Counter[Owner]) -> int:
        return sum(max(0, owner.floor - held[owner]) for owner in self.pool._ledger.owners())

    def has_floors(self) -> bool:
        return any(owner.floor for owner in self.pool._ledger.owners())

    def fork(self, of: int, tail: int) -> None:
        running = self.running[of % len(self.running)]
        if not self.is_idle(running) or not running.computed or running.load is not None:
            return
        tokens = array("I", running.tokens[: running.computed])
        tokens.append(tail)
        twin = Running(
            running.table.fork(running.computed), running.regions, tokens, running.no_store, running.computed
        )
        twin.window = running.window
        self.running.append(twin)
        self.counts["forks"] += 1

    def slide(self, of: int, window: int) -> None:
        """From now on the sequence reads a window only."""
        running = self.running[of % len(self.running)]
        running.window = min(running.window or window, window)

    def leave(self, of: int) -> None:
        self.release(self.running.pop(of % len(self.running)))

    def preempt_and_resume(self, of: int) -> None:
        running = self.running[of % len(self.running)]
        self.release(running)
        self.check()
        self.attach(running)

    def release(self, running: Running) -> None:
        running.table.release()
        running.computed, running.load, running.wait, running.window = 0, None, None, 0
        assert running.table.block_ids == [] and running.table.cached_published == 0
        running.table.release()  # once more does nothing

    # What others do

    def copy_stream(self) -> None:
        """The runner carries out what is ordered; it answers later."""
        if self.tiers is None:
            return
        self.tiers.demote()
        orders = self.tiers.take_orders()
        for block in orders.wipes:
            self.cpu_kv[block] = [POISON] * SIZE
        for demotion in orders.demotions:
            self.cpu_kv[demotion.target] = list(self.kv[demotion.source])
            self.answers.append((demotion, hash(tuple(self.cpu_kv[demotion.target]))))
        for promotion in orders.promotions:
            self.kv[promotion.target] = list(self.cpu_kv[promotion.source])
            self.answers.append((promotion, hash(tuple(self.kv[promotion.target]))))

    def answer(self, which: int, fails: bool) -> None:
        """One answer comes, in any order; then it comes again, and an answer to an old order."""
        if self.tiers is None or not self.answers:
            return
        order, checksum = self.answers.pop(which % len(self.answers))
        self.old_answers.append(order)
        self.say(order, checksum, not fails)
        before = digest(self.pool) + digest(self.tiers.cpu)
        self.say(order, checksum, True)
        self.say(self.old_answers[which % len(self.old_answers)], checksum, True)
        assert digest(self.pool) + digest(self.tiers.cpu) == before

    def say(self, order: Demote | Promote, checksum: int, ok: bool) -> None:
        assert self.tiers is not None
        if isinstance(order, Demote):
            self.tiers.demoted(order.id, checksum, ok=ok)
        else:
            self.tiers.promoted(order.id, ok=ok and checksum == order.checksum)

    def corrupt(self, block: int) -> None:
        """A byte flips in CPU memory."""
        if self.cpu_blocks:
            self.cpu_kv[block % self.cpu_blocks] = [("flipped", b"")] * SIZE

    def set_rates(self, loads: bool) -> None:
        if self.tiers is not None:
            self.tiers.rates = LOADS if loads else COMPUTES

    def set_quota(self, name: int, quota: int, in_cpu: bool) -> None:
        root = (PUBLIC, GROUP, A, B)[name % 4]
        wanted = QUOTAS[quota % len(QUOTAS)]
        pool = self.tiers.cpu if in_cpu and self.tiers is not None else self.pool
        others = sum(owner.floor for owner in pool._ledger.owners() if owner.root != root)
        if others + (wanted.floor if wanted else 0) > pool.num_blocks:
            with pytest.raises(ValueError, match="floors"):
                pool.set_quota(root, wanted)
        elif pool is self.pool:
            self.pins.set_quota(root, wanted)
        else:
            pool.set_quota(root, wanted)

    def pin(self, of: int, until: int) -> None:
        running = self.running[of % len(self.running)]
        self.pins.expire(until)
        name = f"pin {until % 2}"
        if self.pool.account(running.regions[0].root).quota is None:
            self.pins.set_quota(running.regions[0].root, Quota(pinned=2))
        num_tokens = self.pins.pin(name, running.regions, running.tokens, until + 3)
        self.counts["pinned"] += num_tokens
        root = running.regions[0].root
        quota = self.pool.account(root).quota
        assert self.pins.num_pinned(root) <= (quota.pinned if quota else 0)

    def purge(self, name: int) -> None:
        root = (PUBLIC, GROUP, A, B)[name % 4]
        if self.tiers is not None:
            self.tiers.purge(root)
            assert audit.num_sealed_of(self.tiers.cpu, root) == 0
        else:
            self.pool.purge(root)
        assert audit.num_sealed_of(self.pool, root) == 0

    def clear(self) -> None:
        (self.tiers or self.pool).clear()
        assert self.pool.num_cached == 0 and (
            self.tiers is None or not self.tiers.cpu.num_cached or self.tiers.num_in_transfer
        )

    def publish(self) -> None:
        """Events may be taken at any time, and applied twice; between two times only the net change matters."""
        events = (self.tiers or self.pool).take_events()
        self.learn()
        for tier, pool in self.tier_pools():
            full = [key for key, path in self.resident[tier].items() if len(path[-1][1]) == SIZE]
            assert sorted(full) == sorted(pool.sealed_keys())
        for _ in range(2):
            self.index.apply(WORKER, self.epoch, events)
        self.index.apply(WORKER, self.epoch - 1, events[::-1])
        assert self.index.keys_of(WORKER, DEVICE) == set(self.pool.sealed_keys())
        assert self.index.keys_of(WORKER, CPU) == (set(self.tiers.cpu.sealed_keys()) if self.tiers else set())

    def crash(self) -> None:
        """The worker dies and comes back empty: a new epoch."""
        self.counts["crashes"] += 1
        self.start()
        self.index.apply(WORKER, self.epoch, [])
        assert self.index.num_blocks(WORKER) == 0

    # What always holds

    def check(self) -> None:
        """All invariants, after every step."""
        self.learn()
        self.poison()
        (self.tiers or self.pool).check(deep=True)
        self.check_places()
        self.check_references()
        self.check_resident()
        self.check_contents()
        self.check_order()

    def learn(self) -> None:
        """Take over what is resident: each sealed key stands for the one path that its block's record spells out."""
        self.before = {tier: set(paths.values()) for tier, paths in self.resident.items()}
        for tier, pool in self.tier_pools():
            path_of = {0: ()} if tier == DEVICE else {0: (), **self.path_of}
            contents = pool.contents
            todo = sorted(contents.by_key.values(), key=lambda block: contents.numbers[block])
            while todo:
                waiting = []
                for block in todo:
                    parent = path_of.get(contents.parents[block])
                    if parent is None:
                        waiting.append(block)
                        continue
                    tokens = tuple(array("I", contents.tokens[block]))
                    path_of[contents.numbers[block]] = (*parent, (contents.roots[block], tokens))
                assert len(waiting) < len(todo), "a sealed block without a parent"
                todo = waiting
            self.resident[tier] = {key: path_of[contents.numbers[block]] for key, block in contents.by_key.items()}
            self.path_of = path_of

    def tier_pools(self) -> list[tuple[int, BlockPool]]:
        return [(DEVICE, self.pool), *([(CPU, self.tiers.cpu)] if self.tiers else [])]

    def poison(self) -> None:
        for block in self.pool._free:
            self.kv[block] = [POISON] * SIZE

    def check_places(self) -> None:
        for _, pool in self.tier_pools():
            assert pool.num_free + pool.num_cached + pool.num_referenced == pool.num_blocks
            assert pool.num_free + pool.num_cached == pool.num_available
        assert self.pool.num_holders == sum(bool(running.table.block_ids) for running in self.running)
        now = [self.pool.generation(BlockId(block)) for block in range(self.num_blocks)]
        assert all(new >= old for new, old in zip(now, self.generations, strict=True))
        self.generations = now

    def check_references(self) -> None:
        held: Counter[int] = Counter()
        tables = [running.table for running in self.running] + [pin.table for pin in self.pins._pins.values()]
        for table in tables:
            held.update(block for block in table.block_ids if block != NO_BLOCK)
            held.update(block for _, block in table._stand_ins)
            held.update(table._copies.sources)
        if self.tiers is not None:
            held.update(promotion.order.target for promotion in self.tiers._promotions.values())
            in_cpu = Counter(promotion.order.source for promotion in self.tiers._promotions.values())
            in_cpu.update(demotion.order.target for demotion in self.tiers._demotions.values())
            assert all(self.tiers.cpu.references(BlockId(b)) == in_cpu[b] for b in range(self.cpu_blocks))
            assert len({d.number for d in self.tiers._demotions.values()}) == len(self.tiers._demotions)
        assert all(self.pool.references(BlockId(block)) == held[block] for block in range(self.num_blocks))

    def check_resident(self) -> None:
        """Keys say what they name; what is sealed is closed under parents; charges are where they belong."""
        everywhere: set[Path] = set()
        for tier, pool in self.tier_pools():
            paths = self.resident[tier]
            assert len(set(paths.values())) == len(paths)
            everywhere |= set(paths.values())
            assert all(len(path) == 1 or path[:-1] in everywhere for path in paths.values())
            for key, path in paths.items():
                assert key_of(path, self.key_bits) == key
                owner = pool._owners[pool.contents.by_key[key]]
                assert owner is not None and owner.root == path[-1][0]
        device, cpu = (self.resident[tier] for tier in (DEVICE, CPU))
        assert all(len(path[-1][1]) == SIZE for path in cpu.values())
        shared = set(device.values()) & set(cpu.values())
        for path in shared:
            key = next(key for key, other in device.items() if other == path)
            assert self.tiers and self.pool.number(self.pool.contents.by_key[key]) == self.tiers.cpu.number(
                self.tiers.cpu.contents.by_key[key]
            )

    def check_contents(self) -> None:
        """Every sequence reads its own tokens, computed in a scope that it may read, also through sealed blocks."""
        for running in self.running:
            if running.load is not None or running.wait is not None:
                continue
            for position in range(running.computed):
                block = running.table.block_ids[position // SIZE]
                if block != NO_BLOCK:
                    digest, scope = self.kv[block][position % SIZE]
                    assert digest == running.entry(position)[0] and self.may_read(running, position, scope)
                else:
                    assert running.window and position < running.computed - running.window
        for key, path in self.resident[DEVICE].items():
            tokens = array("I", [token for _, part in path for token in part])
            before = len(tokens) - len(path[-1][1])
            for offset in range(len(path[-1][1])):
                wanted = digest_of(tokens[: before + offset + 1]), path[-1][0]
                assert self.kv[self.pool.contents.by_key[key]][offset] == wanted

    def may_read(self, running: Running, position: int, scope: bytes) -> bool:
        """Whether KV at a position may be of this scope."""
        readable = [r.root for r in running.regions if r.end is None or position < r.end]
        return scope in readable or scope == root_at(running.regions, position // SIZE * SIZE)

    def check_order(self) -> None:
        """Ceilings hold for what is not in use; floors can be grown to."""
        for _, pool in self.tier_pools():
            for owner in pool._ledger.owners():
                if owner.excess and owner.charge > owner.held:
                    cached = [
                        block for block, other in enumerate(pool._owners)
                        if other is owner and not pool.references(BlockId(block))
                    ]  # fmt: skip
                    assert all(pool._order._busy(block) for block in cached)

    def stop(self) -> None:
        """All sequences end: nothing is held, and after a purge nothing is left."""
        while self.running:
            self.release(self.running.pop())
        while self.pins.give_way():
            pass
        self.copy_stream()
        while self.answers:
            self.answer(0, False)
        assert self.pool.num_referenced == 0 and len(self.pool.flights) == 0 and self.pool.num_holders == 0
        for name in range(4):
            self.purge(name)
        for _, pool in self.tier_pools():
            assert pool.num_free == pool.num_blocks
        self.check()
        self.publish()


def key_of(path: Path, key_bits: int) -> BlockKey:
    """The key of a path, made anew from its scopes and tokens."""
    root, last = path[-1]
    if len(last) < SIZE:
        seed, parent = int.from_bytes(root[:8], "little"), bytes(key_of(path[:-1], key_bits)) if path[1:] else b""
        start = xxh3_128_digest(parent + root, seed) if parent else root
        whole = int.from_bytes(xxh3_128_digest(start + array("I", last).tobytes(), seed), "little")
        return BlockKey((whole % (1 << key_bits)).to_bytes(16, "little"))
    regions: list[Region] = []
    for number, (root, _) in enumerate(path, 1):
        if regions and regions[-1].root == root:
            regions.pop()
        regions.append(Region(root, number * SIZE))  # type: ignore[arg-type]
    regions[-1] = Region(regions[-1].root, None)
    tokens = array("I", [token for _, part in path for token in part])
    return block_keys(regions, tokens, SIZE, key_bits=key_bits)[-1]


def digest(pool: BlockPool) -> bytes:
    """Everything that a pool will ever base a decision on."""
    order, contents = pool._order, pool.contents
    lists = [list(order._lists.iterate(segment)) for segment in order._segments]
    own = [(owner.root, owner.charge, owner.held, [list(order._own.iterate(h)) for h in owner.lists])
           for owner in pool._ledger.owners()]  # fmt: skip
    state = repr((
        pool._free, list(pool._references), list(pool._generations), sorted(contents.by_key.items()), lists, own,
        list(contents.numbers), list(contents.parents), contents.tokens, contents.roots, bytes(order._hits),
        sorted(order._parked.items()), pool.num_free, pool.num_cached,
    ))  # fmt: skip
    return hashlib.blake2b(state.encode()).digest()
