"""The CPU tier as data: a memory that carries the orders out, late, twice, or wrongly."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from zlib import crc32

import pytest

from kvstore import audit
from kvstore.block import BlockId, BrokenInvariant, WorkerId
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.events import CPU, DEVICE, BlocksRemoved, BlocksStored
from kvstore.memory_index import MemoryIndex
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot, scope_root
from kvstore.tiers import Attached, Load, Tiers, cpu_pool
from kvstore.transfers import Demote, Orders, Promote, Rates

SIZE = 4
PUBLIC, A, B = (scope_root(b"s", b"m", name, block_size=SIZE) for name in ("public", "tenant:a", "tenant:b"))
FAST = Rates(prefill_token_s=1.0)
EMPTY, ZERO = b"poison", b"zero"


def own(root: ScopeRoot) -> list[Region]:
    return [Region(root, None)]


def text(first: int, blocks: int) -> array[int]:
    return array("I", range(first, first + blocks * SIZE))


@dataclass
class Worker:
    """Two tiers, their memories, and a copy stream that answers when it is told to."""

    device_blocks: int = 8
    cpu_blocks: int = 32
    rates: Rates = FAST
    tiers: Tiers = field(init=False)
    device: dict[int, bytes] = field(default_factory=dict)
    cpu: dict[int, bytes] = field(default_factory=dict)
    answers: list[tuple[Demote | Promote, int | bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        pool = BlockPool(self.device_blocks, SIZE)
        self.tiers = Tiers(pool, cpu_pool(pool, self.cpu_blocks), rates=self.rates, max_demotions=self.device_blocks)

    def copy(self) -> Orders:
        """Carry out what is ordered; the answers wait."""
        orders = self.tiers.take_orders()
        for block in orders.wipes:
            self.cpu[block] = ZERO
        for demotion in orders.demotions:
            self.cpu[demotion.target] = self.device[demotion.source]
            self.answers.append((demotion, crc32(self.cpu[demotion.target])))
        for promotion in orders.promotions:
            self.device[promotion.target] = self.cpu[promotion.source]
            self.answers.append((promotion, crc32(self.device[promotion.target]) == promotion.checksum))
        return orders

    def answer(self) -> None:
        """Everything that was carried out is answered."""
        answers, self.answers = self.answers, []
        for order, outcome in answers:
            if isinstance(order, Demote):
                self.tiers.demoted(order.id, int(outcome))
            else:
                self.tiers.promoted(order.id, ok=bool(outcome))

    def settle(self) -> None:
        self.copy()
        self.answer()

    def content(self, regions: list[Region], tokens: array[int], index: int) -> bytes:
        return repr((regions, list(tokens[: (index + 1) * SIZE]))).encode()

    def compute(self, table: BlockTable, regions: list[Region], tokens: array[int], start: int) -> None:
        """All blocks from `start` on are computed; those before must be right."""
        for index in range(start // SIZE):
            assert self.device[table.block_ids[index]] == self.content(regions, tokens, index)
        assert table.reserve(len(tokens)) and table.prepare_write(start, len(tokens))
        table.take_copies()
        table.copies_done()
        for index in range(start // SIZE, len(tokens) // SIZE):
            self.device[table.block_ids[index]] = self.content(regions, tokens, index)
        table.seal(tokens, len(tokens))

    def attach(self, regions: list[Region], tokens: array[int]) -> tuple[BlockTable, Attached]:
        table = BlockTable(self.tiers.device, regions)
        return table, self.tiers.attach_prefix(table, tokens, len(tokens) - 1)

    def use(self, regions: list[Region], tokens: array[int]) -> int:
        """Run a prompt, loads and demotions answered at once; how many tokens were computed."""
        table, attached = self.attach(regions, tokens)
        self.settle()
        start = attached.num_tokens
        if attached.load is not None:
            assert attached.load.done
            start += attached.load.num_loaded
        self.compute(table, regions, tokens, start)
        table.release()
        self.tiers.demote()
        self.settle()
        self.tiers.check(deep=True)
        return len(tokens) - start


def test_what_is_evicted_is_loaded_back() -> None:
    worker = Worker()
    assert worker.use(own(A), text(0, 5)) == 20
    for burst in range(1, 4):
        worker.use(own(B), text(100 * burst, 6))
    assert worker.tiers.device.num_sealed == 8
    assert worker.use(own(A), text(0, 5)) == 4  # the last block would leave nothing to compute
    assert worker.tiers.counts.promoted >= 3 and worker.tiers.counts.corrupt == 0
    assert worker.use(own(B), text(0, 5)) == 20  # B had never computed it


def test_sealed_blocks_in_use_are_copied_when_few_are_cached() -> None:
    """What is given back may be evicted before the next look."""
    worker = Worker()
    tables = [BlockTable(worker.tiers.device, own(root)) for root in (A, B)]
    for table, root in zip(tables, (A, B), strict=True):
        worker.compute(table, own(root), text(0, 4), 0)
    assert worker.tiers.demote() == 8
    parents_first = [order.source for order in worker.copy().demotions]
    assert parents_first == [*tables[0].block_ids, *tables[1].block_ids]
    worker.answer()
    assert worker.tiers.demote() == 0  # once each
    for table in tables:
        table.release()
    assert worker.tiers.device.allocate(8) is not None
    assert worker.tiers.cpu.num_sealed == 8
    worker.tiers.check(deep=True)


def test_what_is_in_use_is_not_copied_while_there_is_room() -> None:
    worker = Worker(device_blocks=16)
    table = BlockTable(worker.tiers.device, own(A))
    worker.tiers = Tiers(worker.tiers.device, cpu_pool(worker.tiers.device, 32), max_demotions=4)
    worker.compute(table, own(A), text(0, 8), 0)
    assert worker.tiers.demote() == 0
    other = BlockTable(worker.tiers.device, own(B))
    worker.compute(other, own(B), text(100, 5), 0)
    assert [worker.tiers.demote() for _ in range(2)] == [4, 0]  # so many under way at most
    worker.settle()
    assert [worker.tiers.demote() for _ in range(2)] == [4, 0]


def test_blocks_in_use_that_are_purged_are_not_copied() -> None:
    worker = Worker()
    table = BlockTable(worker.tiers.device, own(A))
    worker.compute(table, own(A), text(0, 8), 0)
    worker.tiers.purge(A)
    assert worker.tiers.demote() == 0
    table.release()
    worker.tiers.check(deep=True)


def test_loading_only_when_it_is_cheaper() -> None:
    assert Rates().prefers_load(1, 16)
    assert Rates(1.0, 1.0, 0.2).prefers_load(2, 16) and not Rates(1.0, 1.0, 0.09).prefers_load(2, 16)
    worker = Worker(rates=Rates(load_s=0.0, load_block_s=9.0, prefill_token_s=1.0))
    worker.use(own(A), text(0, 5))
    worker.use(own(B), text(100, 8))
    assert worker.use(own(A), text(0, 5)) == 20 and worker.tiers.counts.recomputed == 4
    worker.tiers.rates = Rates(load_block_s=3.0, prefill_token_s=1.0)
    worker.use(own(B), text(100, 8))
    assert worker.use(own(A), text(0, 5)) == 4


def test_a_flipped_byte_is_recomputed() -> None:
    worker = Worker()
    worker.use(own(A), text(0, 7))
    worker.use(own(B), text(100, 8))
    victims = [b for b, data in worker.cpu.items() if data == worker.content(own(A), text(0, 7), 3)]
    assert len(victims) == 1
    worker.cpu[victims[0]] = b"flipped"
    assert worker.use(own(A), text(0, 7)) == 4 * SIZE  # three blocks came whole
    assert worker.tiers.counts.corrupt == 1
    worker.use(own(B), text(100, 8))
    assert worker.use(own(A), text(0, 7)) == SIZE


def test_many_readers_one_load() -> None:
    worker = Worker(device_blocks=10)
    worker.use(own(A), text(0, 6))
    worker.use(own(B), text(100, 10))
    table, attached = worker.attach(own(A), text(0, 6))
    assert attached.load is not None and not attached.load.done
    others = [worker.attach(own(A), text(0, 6)) for _ in range(5)]
    assert all(found == Attached(0) and other.pending is not None for other, found in others)
    orders = worker.copy()
    assert len(orders.promotions) == 5
    assert not any(other.pending.ready for other, _ in others if other.pending)
    worker.answer()
    assert attached.load.num_loaded == 20
    worker.compute(table, own(A), text(0, 6), 20)
    for other, _ in others:
        assert other.pending is not None and other.pending.ready
        other.release()
        found = worker.tiers.attach_prefix(other, text(0, 6), 23)
        assert found == Attached(23) and len(other.take_copies()) == 1
        other.release()
    table.release()
    worker.tiers.check(deep=True)


def test_the_runner_may_answer_late_or_twice_or_never_asked() -> None:
    worker = Worker()
    tiers = worker.tiers
    worker.use(own(A), text(0, 4))
    assert not tiers.demoted(999, 1) and tiers.promoted(999, ok=True) is None
    pool = tiers.device
    table = BlockTable(pool, own(B))
    assert table.reserve(16)
    worker.compute(table, own(B), text(100, 4), 0)
    table.release()
    ordered = tiers.demote()
    assert ordered == 4
    orders = worker.copy()
    taken = pool.allocate(8)  # all the device is overwritten before the answer
    assert taken is not None
    for block in taken:
        worker.device[block] = EMPTY
    sealed, stored = tiers.cpu.num_sealed, tiers.counts.demoted
    for order in orders.demotions:
        assert not tiers.demoted(order.id, 7)
        assert not tiers.demoted(order.id, 7)
    assert (tiers.cpu.num_sealed, tiers.counts.demoted, tiers.counts.void) == (sealed, stored, 4)
    assert tiers.cpu.num_referenced == 0 and set(tiers.take_orders().wipes) == {o.target for o in orders.demotions}
    pool.release(taken)
    tiers.check(deep=True)


def test_a_sequence_that_leaves_while_it_loads_leaves_no_trace() -> None:
    worker = Worker()
    worker.use(own(A), text(0, 6))
    worker.use(own(B), text(100, 8))
    table, attached = worker.attach(own(A), text(0, 6))
    assert attached.load is not None
    worker.copy()
    targets = [BlockId(block) for block in table.block_ids]
    table.release()
    assert all(worker.tiers.device.references(block) == 1 for block in targets)  # the copies still write to them
    assert worker.tiers.device.num_referenced == 5 and worker.tiers.device.num_holders == 0
    assert worker.tiers.device.allocate(4) is None
    worker.answer()
    assert attached.load.done and attached.load.num_loaded == 0
    assert worker.tiers.device.num_referenced == 0 and len(worker.tiers.device.flights) == 0
    worker.tiers.check(deep=True)
    assert worker.use(own(A), text(0, 6)) == SIZE


def test_a_failed_copy_is_no_copy() -> None:
    worker = Worker()
    table = BlockTable(worker.tiers.device, own(A))
    worker.compute(table, own(A), text(0, 4), 0)
    table.release()
    assert worker.tiers.demote() == 4
    for order in worker.tiers.take_orders().demotions:
        assert not worker.tiers.demoted(order.id, 0, ok=False)
    assert worker.tiers.cpu.num_sealed == 0 and worker.tiers.cpu.num_referenced == 0
    assert worker.tiers.demote() == 4
    worker.settle()
    assert worker.tiers.cpu.num_sealed == 4 and worker.tiers.demote() == 0


def test_events_tell_the_tiers_apart() -> None:
    worker, index, name = Worker(), MemoryIndex(), WorkerId("w")
    for step in range(12):
        worker.use(own(A), text(100 * (step % 5), 6))
        events = worker.tiers.take_events()
        index.apply(name, 1, events)
        assert index.keys_of(name, DEVICE) == set(worker.tiers.device.sealed_keys())
        assert index.keys_of(name, CPU) == set(worker.tiers.cpu.sealed_keys())
        assert all(isinstance(event, (BlocksStored, BlocksRemoved)) for event in events)
    prefix = index.match(list(worker.tiers.cpu.sealed_keys())[:1])
    assert prefix[name].num_blocks == 1
    worker.tiers.clear()
    index.apply(name, 1, worker.tiers.take_events())
    assert index.num_blocks(name) == 0


def test_purge_empties_both_tiers_and_wipes() -> None:
    worker = Worker()
    regions = [Region(PUBLIC, 2 * SIZE), Region(A, None)]
    worker.use(regions, text(0, 5))
    worker.use(own(B), text(100, 6))
    tiers = worker.tiers
    purged = tiers.purge(A)
    assert purged.held == 0 and purged.freed >= 3
    assert audit.num_sealed_of(tiers.device, A) == audit.num_sealed_of(tiers.cpu, A) == 0
    worker.settle()
    secrets = {worker.content(regions, text(0, 5), index) for index in (2, 3, 4)}
    assert not secrets & set(worker.cpu.values())
    tiers.check(deep=True)
    assert worker.use(regions, text(0, 5)) == 12  # the published head was not A's
    tiers.purge(PUBLIC)
    assert worker.use(regions, text(0, 5)) == 20


def test_a_purge_reaches_copies_on_their_way() -> None:
    worker = Worker()
    worker.use(own(A), text(0, 6))
    worker.use(own(B), text(100, 8))
    table, attached = worker.attach(own(A), text(0, 6))
    worker.copy()
    worker.tiers.purge(A)
    worker.answer()
    assert attached.load is not None and attached.load.done and attached.load.num_loaded == 0
    worker.compute(table, own(A), text(0, 6), 0)
    table.release()
    worker.settle()
    worker.tiers.purge(A)
    worker.settle()
    assert set(worker.cpu.values()) <= {ZERO, *(worker.content(own(B), text(100, 8), i) for i in range(8))}
    worker.tiers.check(deep=True)


def test_quotas_of_the_cpu_tier() -> None:
    worker = Worker(cpu_blocks=12)
    worker.tiers.cpu.set_quota(A, Quota(ceiling=3))
    worker.tiers.cpu.set_quota(B, Quota(floor=6))
    worker.use(own(B), text(0, 6))
    for burst in range(1, 6):
        worker.use(own(A), text(100 * burst, 8))
        assert worker.tiers.cpu.account(A).charge <= 3
    assert worker.use(own(B), text(0, 6)) == SIZE


def test_without_room_in_the_cpu_tier_nothing_fails() -> None:
    worker = Worker(cpu_blocks=2)
    for step in range(8):
        worker.use(own(A), text(100 * (step % 3), 6))
    assert worker.tiers.cpu.num_sealed <= 2


def test_an_evicted_parent_takes_its_lower_children_along() -> None:
    """A child's copy without its parent anywhere could never be found again."""
    worker = Worker()
    table = BlockTable(worker.tiers.device, own(A))
    worker.compute(table, own(A), text(0, 4), 0)
    table.release()
    worker.tiers.demote()
    orders = worker.tiers.take_orders().demotions
    for order in orders[:2]:  # the leaf and the one above it
        worker.device.setdefault(order.source, EMPTY)
        assert worker.tiers.demoted(order.id, 1)
    for order in orders[2:]:
        worker.tiers.demoted(order.id, 1, ok=False)
    assert worker.tiers.cpu.num_sealed == 2
    assert worker.tiers.device.allocate(6) is not None  # evicts two blocks that have copies
    assert worker.tiers.cpu.num_sealed == 2
    worker.tiers.check(deep=True)
    assert worker.tiers.device.allocate(1) is not None  # and one that has none
    assert worker.tiers.cpu.num_sealed == 0
    worker.tiers.check(deep=True)


def test_no_store_loads_and_keeps_to_itself() -> None:
    worker = Worker()
    worker.use(own(A), text(0, 5))
    worker.use(own(B), text(100, 8))
    table = BlockTable(worker.tiers.device, own(A), no_store=True)
    attached = worker.tiers.attach_prefix(table, text(0, 5), 19)
    worker.settle()
    assert isinstance(attached.load, Load) and attached.load.num_loaded == 16
    assert all(worker.tiers.device.is_writable(BlockId(block)) for block in table.block_ids)
    table.release()
    worker.tiers.check(deep=True)


def test_pools_must_belong_together() -> None:
    with pytest.raises(ValueError, match="made for"):
        Tiers(BlockPool(4, SIZE), BlockPool(4, SIZE, tier=CPU))


def test_check_sees_orphans() -> None:
    worker = Worker()
    worker.use(own(A), text(0, 5))
    worker.use(own(B), text(100, 8))
    worker.tiers.check(deep=True)
    worker.tiers._checksums.popitem()
    with pytest.raises(BrokenInvariant, match="checksums"):
        worker.tiers.check(deep=True)


@pytest.mark.parametrize("seed", range(4))
def test_a_set_larger_than_the_device_costs_less_with_the_tier(seed: int) -> None:
    """Conversations in turns, three times the device: at least half the computing is saved, and nothing is wrong."""
    rng = random.Random(seed)
    with_tier, without = Worker(16, 64), Worker(16, 1)
    texts = [text(1000 * number, 3) for number in range(8)]
    computed = [0, 0]
    for _ in range(60):
        number = rng.randrange(8)
        if len(texts[number]) < 6 * SIZE:
            texts[number] = text(1000 * number, len(texts[number]) // SIZE + 1)
        for which, worker in enumerate((with_tier, without)):
            computed[which] += worker.use(own(A), texts[number])
    assert 2 * computed[0] <= computed[1]
