"""Copy-on-write at token grain: partial reuse, published prefixes that end inside a block, forks, windows."""

from __future__ import annotations

from array import array

import pytest

from kvstore.block import NO_BLOCK, BlockId, BrokenInvariant
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.scope import Region, scope_root

SIZE = 4
PUBLIC, GROUP, A, B = (
    scope_root(b"s", b"m", n, block_size=SIZE) for n in ("public", "group:g", "tenant:a", "tenant:b")
)
OWN_A, OWN_B = [Region(A, None)], [Region(B, None)]


def tokens(*values: int) -> array[int]:
    return array("I", values)


def cache(pool: BlockPool, regions: list[Region], prompt: array[int]) -> list[int]:
    """Compute, seal and leave a prompt; the blocks it stood in."""
    table = BlockTable(pool, regions)
    table.attach_prefix(prompt, len(prompt) - 1)
    assert table.reserve(len(prompt)) and table.prepare_write(len(prompt) - 1, len(prompt))
    table.take_copies()
    table.copies_done()
    table.seal(prompt, len(prompt))
    blocks = list(table.block_ids)
    table.release()
    return blocks


def test_the_child_with_the_longest_run_is_copied_and_cut() -> None:
    pool = BlockPool(32, SIZE)
    cache(pool, OWN_A, tokens(0, 1, 2, 3, 10, 11, 20, 21))
    best = cache(pool, OWN_A, tokens(0, 1, 2, 3, 10, 11, 12, 22))[1]
    cache(pool, OWN_A, tokens(0, 1, 2, 3, 10, 30, 31, 32))
    table = BlockTable(pool, OWN_A)
    assert table.attach_prefix(tokens(0, 1, 2, 3, 10, 11, 12, 13, 14), 8) == 7
    (order,) = table.take_copies()
    assert order == (best, table.block_ids[1], 3) and table.take_copies() == []
    assert pool.references(order.source) == 1 and pool.is_writable(order.target)
    assert table.reserve(9) and table.prepare_write(7, 9) and table.take_copies() == []
    table.copies_done()
    assert pool.references(order.source) == 0
    table.seal(tokens(0, 1, 2, 3, 10, 11, 12, 13, 14), 9)
    table.release()
    pool.check(deep=True)
    assert pool.num_sealed == 5 and pool.num_referenced == 0


def test_a_source_that_is_read_is_not_evicted_and_a_full_pool_means_no_part() -> None:
    pool = BlockPool(3, SIZE)
    cache(pool, OWN_A, tokens(0, 1, 2, 3, 10, 11, 12, 13))
    other = BlockTable(pool, OWN_B)
    assert other.reserve(4)
    table = BlockTable(pool, OWN_A)
    assert table.attach_prefix(tokens(0, 1, 2, 3, 10, 11, 99), 6) == 4  # there is no block to copy to
    assert pool.num_referenced == 2 and table.take_copies() == []
    table.release()
    other.release()
    table = BlockTable(pool, OWN_A)
    assert table.attach_prefix(tokens(0, 1, 2, 3, 10, 11, 99), 6) == 6
    assert not table.reserve(9) and pool.num_referenced == 3
    table.release()
    assert pool.num_referenced == 0 and pool.num_sealed == 2
    pool.check(deep=True)


def test_a_part_never_comes_from_a_scope_that_may_not_be_read() -> None:
    pool = BlockPool(32, SIZE)
    cache(pool, OWN_A, tokens(*range(9)))
    cache(pool, [Region(PUBLIC, 4), Region(A, None)], tokens(*range(9)))
    assert BlockTable(pool, OWN_B).attach_prefix(tokens(*range(7)), 6) == 0
    table = BlockTable(pool, [Region(PUBLIC, 4), Region(B, None)])
    assert table.attach_prefix(tokens(*range(7)), 6) == 4 and table.cached_published == 4
    own = BlockTable(pool, [Region(PUBLIC, 4), Region(A, None)])
    assert own.attach_prefix(tokens(*range(7)), 6) == 6 and own.cached_published == 4


def test_a_published_prefix_that_ends_inside_a_block_is_reused_to_its_end_and_no_further() -> None:
    pool = BlockPool(32, SIZE)
    cache(pool, [Region(PUBLIC, None)], tokens(*range(12)))  # the publisher went on to token 11
    for end, cached in ((5, 5), (6, 6), (8, 8)):
        table = BlockTable(pool, [Region(PUBLIC, end), Region(B, None)])
        assert table.attach_prefix(tokens(*range(12)), 11) == cached
        assert table.cached_published == cached
        assert sum(order.num_tokens for order in table.take_copies()) == end % SIZE
        table.release()
    table = BlockTable(pool, [Region(PUBLIC, 6), Region(B, None)])
    assert table.attach_prefix(tokens(0, 1, 2, 3, 4, 77, 6, 7, 8), 8) == 5
    table.release()
    inside = BlockTable(pool, [Region(PUBLIC, 2), Region(B, None)])  # published text shorter than one block
    assert inside.attach_prefix(tokens(*range(12)), 11) == 2 == inside.cached_published
    inside.release()
    pool.check(deep=True)
    assert pool.num_referenced == 0


def test_the_longest_of_own_and_published_parts_is_taken() -> None:
    pool = BlockPool(32, SIZE)
    regions = [Region(PUBLIC, 6), Region(GROUP, 7), Region(B, None)]
    cache(pool, [Region(PUBLIC, None)], tokens(*range(9)))
    cache(pool, [Region(PUBLIC, 4), Region(GROUP, None)], tokens(0, 1, 2, 3, 4, 5, 6, 99, 9))
    table = BlockTable(pool, regions)
    assert table.attach_prefix(tokens(*range(12)), 11) == 7 == table.cached_published
    table.release()
    cache(pool, regions, tokens(*range(9)))
    table = BlockTable(pool, regions)
    assert table.attach_prefix(tokens(*range(12)), 11) == 8 and table.cached_published == 4


def test_forks_share_all_and_the_first_to_write_copies() -> None:
    pool = BlockPool(32, SIZE)
    prompt = tokens(*range(10))
    one = BlockTable(pool, OWN_A)
    assert one.attach_prefix(prompt, 9) == 0 and one.reserve(11)
    one.seal(prompt, 10)
    twins = [one.fork(10) for _ in range(7)]
    assert pool.num_referenced == 3
    everyone = [*twins, one]
    orders = []
    for table in everyone:
        assert table.reserve(11) and table.prepare_write(10, 11)
        orders += table.take_copies()
    assert len(orders) == 8 and {order.num_tokens for order in orders} == {2}
    assert len({order.source for order in orders}) == 1 and len({order.target for order in orders}) == 8
    for table in everyone:
        table.copies_done()
    assert pool.num_referenced == 2 + 8  # shared and private, by count
    assert all(pool.is_writable(BlockId(table.block_ids[2])) for table in everyone)
    assert one.reserve(12) and one.prepare_write(11, 12) and one.take_copies() == []  # the block is its own now
    for number, table in enumerate(everyone):
        table.seal(tokens(*range(10), 50 + number // 2, 60), 12)
    assert pool.num_sealed == 2 + 4
    for table in everyone:
        table.release()
    pool.check(deep=True)
    assert pool.num_referenced == 0 and pool.num_free == 32 - 6


def test_prepare_write_all_or_nothing() -> None:
    pool = BlockPool(3, SIZE)
    one = BlockTable(pool, OWN_A, no_store=True)
    assert one.reserve(10)
    twin = one.fork(10)
    assert not twin.prepare_write(9, 10) and twin.block_ids == one.block_ids and twin.take_copies() == []
    with pytest.raises(BrokenInvariant, match="reserved"):
        twin.prepare_write(10, 13)
    one.release()
    assert twin.prepare_write(9, 10)


def test_writing_at_a_border_needs_no_copy() -> None:
    pool = BlockPool(8, SIZE)
    one = BlockTable(pool, OWN_A, no_store=True)
    assert one.reserve(8)
    twin = one.fork(8)
    assert twin.prepare_write(4, 8) and twin.take_copies() == []
    assert twin.block_ids[0] == one.block_ids[0] and twin.block_ids[1] != one.block_ids[1]
    assert pool.references(BlockId(one.block_ids[1])) == 1


def test_sealed_positions_are_never_written() -> None:
    pool = BlockPool(8, SIZE)
    table = BlockTable(pool, OWN_A)
    assert table.reserve(8)
    table.seal(tokens(*range(8)), 8)
    with pytest.raises(BrokenInvariant, match="never written"):
        table.prepare_write(7, 8)
    with pytest.raises(BrokenInvariant, match="forked"):
        table.fork(7)


def test_a_release_with_copies_on_the_way_leaves_nothing() -> None:
    pool = BlockPool(16, SIZE)
    cache(pool, OWN_A, tokens(*range(9)))
    for taken in (False, True):
        table = BlockTable(pool, OWN_A)
        assert table.attach_prefix(tokens(*range(8)), 7) == 7
        if taken:
            table.take_copies()
        table.release()
        table.copies_done()
        assert pool.num_referenced == 0
    table.attach_prefix(tokens(*range(8)), 7)
    with pytest.raises(BrokenInvariant, match="forked"):
        table.fork(7)


def test_a_window_holds_a_bounded_number_of_blocks() -> None:
    pool = BlockPool(16, SIZE)
    table = BlockTable(pool, OWN_A)
    text = tokens(*range(8))
    assert table.reserve(8)
    table.seal(text, 8)
    for position in range(8, 400):
        text.append(position)
        assert table.reserve(len(text)) and table.prepare_write(position, position + 1)
        table.seal(text, len(text))
        table.release_before(position - 8, sinks=2)
        assert pool.num_referenced <= 1 + 2 + 4
        window = table.block_ids[max(0, position - 8) // SIZE :]
        assert NO_BLOCK not in window and table.block_ids[0] != NO_BLOCK
    assert table.block_ids.count(NO_BLOCK) > 90
    table.release()
    pool.check(deep=True)
    assert pool.num_referenced == 0
    again = BlockTable(pool, OWN_A)
    assert again.attach_prefix(text, 300) >= 8  # what was sealed stays cached
    again.release()


def test_a_window_gives_up_shared_blocks_without_taking_them_from_others() -> None:
    pool = BlockPool(32, SIZE)
    text = tokens(*range(16))
    cache(pool, OWN_A, text)
    reader = BlockTable(pool, OWN_A)
    assert reader.attach_prefix(text, 16) == 16
    table = BlockTable(pool, OWN_A)
    assert table.attach_prefix(text, 16) == 16
    assert table.reserve(24)
    assert table.release_before(10) == 0  # sealed blocks go together
    twin = table.fork(20)
    assert table.release_before(17) == 4 and table.block_ids[:4] == [NO_BLOCK] * 4
    assert twin.release_before(20) == 5
    assert all(pool.references(BlockId(block)) == 1 for block in reader.block_ids)
    for each in (table, twin, reader):
        each.release()
    pool.check(deep=True)
    assert pool.num_referenced == 0
