"""Two tiers of one worker: copies of device blocks in CPU memory, made before eviction needs them and loaded back.

Knows no memory: the runner carries orders out and answers. Invariants: a content that is found in the CPU tier has its
parent in one of the tiers; a block that a copy writes to is held until the answer; no answer changes a block whose
content has changed since the order.

    device: cached --(next to be evicted)--> Demote --answer--> cached, and a copy in CPU memory
    CPU:    cached copy --(wanted, cheaper than computing)--> Promote --answer, checksum right--> sealed on the device
                                                                     '--answer, checksum wrong--> dropped, recomputed
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import islice

from kvstore.block import NO_CONTENT, BlockId, BlockKey, BrokenInvariant, Purged
from kvstore.block_key import TOKEN_BYTES, token_bytes
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.contents import Content
from kvstore.events import CPU, Event
from kvstore.scope import ScopeRoot
from kvstore.transfers import Demote, Orders, Promote, Rates

LOOK_AHEAD = 4
UNMEASURED = Rates()


@dataclass(slots=True)
class Load:
    """One sequence's load: blocks on their way. When `done`, `num_loaded` tokens of it are in the table's blocks."""

    table: BlockTable
    life: int
    token_ids: array[int]
    start: int
    published: list[bool]
    ok: list[bool]
    waiting: int
    num_loaded: int = 0
    num_published: int = 0
    """Loaded tokens of regions other than the last one."""

    @property
    def done(self) -> bool:
        """Whether every order was answered."""
        return not self.waiting


@dataclass(frozen=True, slots=True)
class Attached:
    """Tokens that a table can read now, and what is loaded behind them."""

    num_tokens: int
    load: Load | None = None


@dataclass(slots=True)
class _Demotion:
    order: Demote
    content: Content
    number: int
    generation: int


@dataclass(slots=True)
class _Promotion:
    order: Promote
    load: Load
    index: int
    generation: int


@dataclass(slots=True)
class TierCounts:
    """Blocks since the start."""

    demoted: int = 0
    promoted: int = 0
    corrupt: int = 0
    void: int = 0
    """Copies whose source had lost its content when the answer came."""
    received: int = 0
    """From other workers."""
    recomputed: int = 0
    """Blocks found in the CPU tier and not loaded, because computing is cheaper."""


@dataclass(slots=True)
class _Pending:
    demotions: list[Demote] = field(default_factory=list)
    promotions: list[Promote] = field(default_factory=list)


class Tiers:
    """`device` and `cpu` are pools that share their content numbers; build the second one with `cpu_pool`.

    `max_demotions` bounds copies under way to the CPU tier. `rates` may be replaced at any time.
    """

    def __init__(
        self, device: BlockPool, cpu: BlockPool, *, max_demotions: int = 64, rates: Rates = UNMEASURED
    ) -> None:
        if device.numbers is not cpu.numbers or cpu.tier != CPU or device.block_size != cpu.block_size:
            raise ValueError("the CPU pool must be made for this device pool")
        self.device = device
        self.cpu = cpu
        self.rates = rates
        self.counts = TierCounts()
        self.num_purges = 0
        self._max_demotions = max_demotions
        self._last_id = 0
        self._demotions: dict[int, _Demotion] = {}
        self._demoting: dict[int, int] = {}  # content number -> order
        self._promotions: dict[int, _Promotion] = {}
        self._pending = _Pending()
        self._checksums: dict[int, int] = {}  # content number -> checksum
        device.is_only_tier = cpu.is_only_tier = False
        self._uncopied: dict[int, BlockId] = {}
        device.contents.uncopied = self._uncopied
        device.on_forget = self._device_forgot
        device.known_elsewhere = self._cpu_number
        cpu.on_forget = self._cpu_forgot

    # Device to CPU

    def demote(self) -> int:
        """Order copies of the blocks that are evicted next and have none; how many. For the time between two steps.

        Where fewer are cached than it looks ahead, sealed blocks in use come next, the oldest first: when those are
        given back, they may be evicted at once. A tier smaller than the device would drop them again before that.
        """
        room = self._max_demotions - len(self._demotions)
        if room <= 0 or self.device.num_free >= self._max_demotions:
            return 0
        ahead = LOOK_AHEAD * self._max_demotions
        blocks = self.device.next_to_evict(ahead)
        if self.cpu.num_blocks > self.device.num_blocks:
            blocks += islice(self._uncopied.values(), ahead - len(blocks))
        ordered = 0
        for block in blocks:
            if ordered == room:
                break
            ordered += self._demote(block)
        return ordered

    def _demote(self, block: BlockId) -> bool:
        content, number = self.device.contents.of(block), self.device.number(block)
        self._uncopied.pop(number, None)
        if block in self.device.contents.ends:
            return False
        if number in self._demoting or self.cpu.contents.holds(content.key, number):
            return False
        if content.key in self.cpu.contents.by_key or not self._has_room(content.root):
            return False
        targets = self.cpu.allocate(1, content.root)
        if targets is None:
            return False
        order = Demote(self._next_id(), block, targets[0])
        self._demotions[order.id] = _Demotion(order, content, number, self.device.generation(block))
        self._demoting[number] = order.id
        self.device.begin_transfer(block)
        self._pending.demotions.append(order)
        return True

    def _has_room(self, root: ScopeRoot) -> bool:
        """Whether the owner's ceiling lets one more copy in, at the cost of an unused one of its own if need be."""
        owner = self.cpu.account(root)
        if owner.quota is None or owner.quota.ceiling is None:
            return True
        return owner.held < owner.quota.ceiling

    def demoted(self, order_id: int, checksum: int, *, ok: bool = True) -> bool:
        """The answer to a `Demote`; whether the CPU tier now has the block."""
        demotion = self._demotions.pop(order_id, None)
        if demotion is None:
            return False
        order, content = demotion.order, demotion.content
        del self._demoting[demotion.number]
        valid = self.device.generation(order.source) == demotion.generation
        self.counts.void += not valid
        stored = ok and valid and self.cpu.seal_as(order.target, content, demotion.number) == order.target
        if stored:
            self._checksums[demotion.number] = checksum
            self.counts.demoted += 1
        if valid:
            self.device.end_transfer(order.source)  # last: it may evict the source and what it hangs below
        self.cpu.release((order.target,))
        return stored

    # Other workers

    def number_of(self, content: Content) -> int:
        """The number of this very content in whichever tier has it; NO_CONTENT if none does."""
        for pool in (self.device, self.cpu):
            block = pool.contents.find(*content)
            if block is not None:
                return pool.number(block)
        return NO_CONTENT

    def copy(self, content: Content, number: int) -> bool:
        """Have a content of the device in the CPU tier too; whether such a copy is on its way."""
        if number in self._demoting:
            return True
        block = self.device.contents.find(*content)
        return block is not None and self.device.number(block) == number and self._demote(block)

    def make_room(self, root: ScopeRoot) -> list[BlockId] | None:
        """One empty CPU block for what comes from elsewhere, charged to the owner of `root`; None if there is none."""
        return self.cpu.allocate(1, root) if self._has_room(root) else None

    def take_in(self, block: BlockId, content: Content, parent_key: BlockKey | None) -> int:
        """A CPU block was written with what another worker had: its content number, NO_CONTENT if it has no place.

        Its parent, if it has one, must be in one of the tiers still. If the content is here already, that one stays.
        """
        here = self.number_of(content)
        if self.cpu.contents.holds(content.key, here):
            return here
        pools = (self.device, self.cpu)
        if parent_key is not None and not any(pool.contents.holds(parent_key, content.parent) for pool in pools):
            return NO_CONTENT
        if self.cpu.seal_as(block, content, here) != block:
            return NO_CONTENT
        number = self.cpu.number(block)
        self._checksums[number] = 0
        self.counts.received += 1
        return number

    # CPU to device

    def attach_prefix(self, table: BlockTable, token_ids: array[int], limit: int) -> Attached:
        """As `BlockTable.attach_prefix` over both tiers, `table.pending` included.

        With a `load` the sequence waits until it is `done`; then `num_loaded` tokens more are in the table's blocks.
        """
        num_tokens = table.attach_blocks(token_ids, limit)
        if table.watch(token_ids) is not None:
            return Attached(num_tokens)
        load = self._load(table, token_ids, num_tokens, limit)
        if load is None:
            num_tokens += table.attach_part(num_tokens, limit)
        return Attached(num_tokens, load)

    def _load(self, table: BlockTable, token_ids: array[int], start: int, limit: int) -> Load | None:
        """Order what the CPU tier has behind the first `start` tokens, if that is cheaper and the device has room."""
        found, published = self._find(table, token_ids, start, limit)
        size = self.device.block_size
        if not found or not self.rates.prefers_load(len(found), size):
            self.counts.recomputed += len(found)
            return None
        self.cpu.acquire(found, hit=True)
        if not table.reserve(start + len(found) * size):
            self.cpu.release(found)
            return None
        targets = [BlockId(block) for block in table.block_ids[start // size :]]
        self.device.acquire(targets)
        load = Load(table, table.life, token_ids, start, published, [False] * len(found), len(found))
        for index, (source, target) in enumerate(zip(found, targets, strict=True)):
            order = Promote(self._next_id(), source, target, self._checksums[self.cpu.number(source)])
            self._promotions[order.id] = _Promotion(order, load, index, self.cpu.generation(source))
            self._pending.promotions.append(order)
        return load

    def _find(
        self, table: BlockTable, token_ids: array[int], start: int, limit: int
    ) -> tuple[list[BlockId], list[bool]]:
        """The CPU tier's blocks behind the first `start` tokens, and which of them are published."""
        found: list[BlockId] = []
        published: list[bool] = []
        step = self.device.block_size * TOKEN_BYTES
        data = token_bytes(token_ids)
        chain, parent = table.cursor()
        last = min(limit, len(token_ids)) // self.device.block_size if self.device.reuse else 0
        for offset in range(start * TOKEN_BYTES, last * step, step):
            tokens = data[offset : offset + step]
            key = chain.peek(tokens)
            block = self.cpu.contents.find(key, chain.root, parent, tokens)
            if block is None:
                break
            published.append(not chain.in_last_region)
            chain.advance(key)
            parent = self.cpu.number(block)
            found.append(block)
        return found, published

    def promoted(self, order_id: int, *, ok: bool) -> Load | None:
        """The answer to a `Promote`: `ok` if the checksum was right. The load if this was its last order.

        A table that was released meanwhile is left alone: its copies end in blocks that nobody reads.
        """
        promotion = self._promotions.pop(order_id, None)
        if promotion is None:
            return None
        order, load = promotion.order, promotion.load
        valid = self.cpu.generation(order.source) == promotion.generation
        load.ok[promotion.index] = ok and valid
        load.waiting -= 1
        self.counts.void += not valid
        self.counts.promoted += ok and valid
        self.device.release((order.target,))
        self.cpu.release((order.source,))
        if valid and not ok:
            self.counts.corrupt += 1
            self.cpu.drop((order.source,))
        if load.waiting:
            return None
        if load.table.life == load.life:
            self._finish(load)
        return load

    def _finish(self, load: Load) -> None:
        """Seal what came whole, up to the first block that did not."""
        good = load.ok.index(False) if False in load.ok else len(load.ok)
        size = self.device.block_size
        load.num_loaded = good * size
        load.num_published = sum(load.published[:good]) * size
        load.table.seal(load.token_ids, load.start + load.num_loaded)

    # Both

    def take_orders(self) -> Orders:
        """What is to be copied and wiped since the last call."""
        pending, self._pending = self._pending, _Pending()
        return Orders(tuple(self.cpu.take_wipes()), tuple(pending.demotions), tuple(pending.promotions))

    @property
    def num_in_transfer(self) -> int:
        """Orders that were not answered."""
        return len(self._demotions) + len(self._promotions)

    def take_events(self) -> list[Event]:
        """What changed in both tiers."""
        return [*self.device.take_events(), *self.cpu.take_events()]

    def purge(self, root: ScopeRoot) -> Purged:
        """Forget all that the owner of `root` is charged for in both tiers, and what hangs below."""
        self.num_purges += 1
        before = self.device.num_sealed + self.cpu.num_sealed
        held = self.device.purge(root).held + self.cpu.purge(root).held
        return Purged(before - self.device.num_sealed - self.cpu.num_sealed - held, held)

    def clear(self) -> None:
        """Forget what nobody holds, in both tiers."""
        self.cpu.clear()
        self.device.clear()

    def check(self, *, deep: bool = False) -> None:
        """Raise BrokenInvariant if a tier contradicts itself or the other one."""
        self.device.check(deep=deep)
        self.cpu.check(deep=deep)
        if deep:
            numbers = {NO_CONTENT, *self.device.contents.numbers, *self.cpu.contents.numbers}
            if not numbers.issuperset(self.cpu.contents.parents):
                raise BrokenInvariant("a block of the CPU tier outlived its parent in both tiers")
            if self._checksums.keys() != set(self.cpu.contents.numbers) - {NO_CONTENT}:
                raise BrokenInvariant("the checksums are not those of the CPU tier's blocks")
            if any(self.device.number(block) != number for number, block in self._uncopied.items()):
                raise BrokenInvariant("a block to be copied has lost its content")

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _cpu_number(self, content: Content) -> int:
        """The number that a copy of this content has in the CPU tier, or is being made with."""
        block = self.cpu.contents.find(*content)
        return NO_CONTENT if block is None else self.cpu.number(block)

    def _device_forgot(self, key: BlockKey, number: int) -> None:
        """Without a copy the content is gone, and nobody can find what hangs below it in the CPU tier."""
        if not self.cpu.contents.holds(key, number):
            self._drop_below(number)

    def _cpu_forgot(self, key: BlockKey, number: int) -> None:
        self._checksums.pop(number, None)

    def _drop_below(self, number: int) -> None:
        children = self.cpu.contents.children.of(number)
        if children:
            self.cpu.drop(children)


def cpu_pool(device: BlockPool, num_blocks: int, *, policy: str = "slru", wipe: bool = True) -> BlockPool:
    """A pool for copies of the device pool's blocks."""
    return BlockPool(
        num_blocks,
        device.block_size,
        key_bits=device.key_bits,
        reuse=device.reuse,
        policy=policy,
        tier=CPU,
        wipe=wipe,
        numbers=device.numbers,
    )
