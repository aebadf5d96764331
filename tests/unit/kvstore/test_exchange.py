"""Blocks between two workers' CPU tiers: exact, whole, behind their parents, and nothing held when it is over."""

from __future__ import annotations

from array import array

import pytest

from kvstore.exchange import Exchange, Export, Import
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot
from tests.unit.kvstore.test_tiers import PUBLIC, SIZE, A, B, Worker, own, text


def fill(worker: Worker, regions: list[Region], tokens: array[int]) -> None:
    """Compute a prompt and leave it cached."""
    from kvstore.block_table import BlockTable

    table = BlockTable(worker.tiers.device, regions)
    table.attach_prefix(tokens, 0)
    assert table.reserve(len(tokens))
    for index, block in enumerate(table.block_ids):
        worker.device[block] = tokens[index * SIZE : (index + 1) * SIZE].tobytes()
    table.seal(tokens, len(tokens))
    table.release()


def finish(worker: Worker, exchange: Exchange, export: Export) -> Export:
    for _ in range(10):
        if export.ready:
            break
        worker.copy()
        answer(worker)
        exchange.advance(export)
    return export


def answer(worker: Worker) -> None:
    for order, value in worker.answers:
        worker.tiers.demoted(order.id, int(value))
    worker.answers.clear()


def exported(worker: Worker, regions: list[Region], tokens: array[int], first: int = 0, most: int = 100) -> Export:
    """An export that is ready."""
    exchange, export = Exchange(worker.tiers), Export(regions, tokens, first, most)
    exchange.begin_export(export)
    return finish(worker, exchange, export)


def imported(worker: Worker, regions: list[Region], tokens: array[int], most: int = 100) -> Import:
    """An import that has begun."""
    arriving = Import(regions, tokens, most)
    Exchange(worker.tiers).begin_import(arriving)
    return arriving


def move(source: Worker, target: Worker, regions: list[Region], tokens: array[int], most: int = 100) -> int:
    """Everything from one worker to the other; how many blocks arrived."""
    out, into = Exchange(source.tiers), Exchange(target.tiers)
    arriving = imported(target, regions, tokens, most)
    export = exported(source, regions, tokens, arriving.first, len(arriving.rows))
    for row, source_row in zip(arriving.rows, export.rows, strict=False):
        target.cpu[row] = source.cpu[source_row]
        if not into.arrived(arriving, 1):
            break
    arrived = arriving.num_arrived
    out.end_export(export)
    into.end_import(arriving)
    for worker in (source, target):
        assert worker.tiers.cpu.num_referenced == 0
        worker.tiers.check(deep=True)
    return arrived


def content(worker: Worker, regions: list[Region], tokens: array[int]) -> list[bytes]:
    """What the worker's CPU tier has of a prompt, in order."""
    export = exported(worker, regions, tokens)
    found = [worker.cpu[row] for row in export.rows]
    Exchange(worker.tiers).end_export(export)
    return found


def test_a_prompt_moves_whole_and_bit_equal() -> None:
    source, target = Worker(), Worker()
    tokens = text(100, 5)
    fill(source, own(A), tokens)
    assert move(source, target, own(A), tokens) == 5
    assert content(target, own(A), tokens) == content(source, own(A), tokens)
    assert b"".join(content(target, own(A), tokens)) == tokens.tobytes()
    assert move(source, target, own(A), tokens) == 0  # nothing is missing any more


def test_only_what_is_missing_moves_and_no_more_than_asked() -> None:
    source, target = Worker(), Worker()
    tokens = text(100, 6)
    fill(source, own(A), tokens)
    fill(target, own(A), tokens[: 2 * SIZE])
    assert move(source, target, own(A), tokens, most=5) == 3
    assert move(source, target, own(A), tokens) == 1


def test_a_scope_that_differs_finds_nothing() -> None:
    source, target = Worker(), Worker()
    tokens = text(100, 4)
    fill(source, own(A), tokens)
    assert move(source, target, own(B), tokens) == 0
    fill(source, [Region(PUBLIC, 2 * SIZE), Region(A, None)], tokens)
    assert move(source, target, [Region(PUBLIC, 2 * SIZE), Region(B, None)], tokens) == 2


def test_other_tokens_end_it_where_they_differ() -> None:
    source, target = Worker(), Worker()
    tokens = text(100, 4)
    fill(source, own(A), tokens)
    other = array("I", [*tokens[: 2 * SIZE], *range(900, 900 + 2 * SIZE)])
    assert move(source, target, own(A), other) == 2


def test_a_parent_that_was_lost_meanwhile_ends_it() -> None:
    source, target = Worker(), Worker()
    tokens = text(100, 4)
    fill(source, own(A), tokens)
    fill(target, own(A), tokens[: 2 * SIZE])
    into = Exchange(target.tiers)
    arriving = imported(target, own(A), tokens)
    assert arriving.first == 2
    target.tiers.device.clear()
    assert not into.arrived(arriving, 1)
    into.end_import(arriving)
    target.tiers.check(deep=True)
    assert target.tiers.cpu.num_sealed == 0


def test_what_was_computed_meanwhile_keeps_its_number() -> None:
    source, target = Worker(), Worker()
    tokens = text(100, 3)
    fill(source, own(A), tokens)
    into = Exchange(target.tiers)
    arriving = imported(target, own(A), tokens)
    fill(target, own(A), tokens)
    assert into.arrived(arriving, 3)
    into.end_import(arriving)
    target.tiers.check(deep=True)
    assert target.tiers.cpu.num_sealed == 3 == target.tiers.device.num_sealed


def test_no_room_no_import_and_a_ceiling_is_kept() -> None:
    source, target = Worker(), Worker(cpu_blocks=8)
    tokens = text(100, 6)
    fill(source, own(A), tokens)
    target.tiers.cpu.set_quota(A, Quota(ceiling=2))
    assert move(source, target, own(A), tokens) == 2
    target.tiers.cpu.set_quota(A, Quota(ceiling=0))
    assert not imported(target, own(A), text(500, 3)).rows


def test_an_import_given_up_leaves_free_rows_to_be_wiped() -> None:
    target = Worker()
    into = Exchange(target.tiers)
    arriving = imported(target, own(A), text(0, 4))
    rows = list(arriving.rows)
    into.end_import(arriving)
    assert set(rows) <= set(target.tiers.take_orders().wipes)
    assert target.tiers.cpu.num_free == target.tiers.cpu.num_blocks


def test_an_export_outlives_the_eviction_of_its_source() -> None:
    source = Worker()
    tokens = text(100, 4)
    fill(source, own(A), tokens)
    out = Exchange(source.tiers)
    export = exported(source, own(A), tokens)
    assert len(export.rows) == 4
    source.tiers.device.clear()
    source.tiers.purge(A)
    assert b"".join(source.cpu[row] for row in export.rows) == tokens.tobytes()
    assert not set(export.rows) & set(source.tiers.take_orders().wipes)
    out.end_export(export)
    assert set(source.tiers.take_orders().wipes) >= set(export.rows)
    source.tiers.check(deep=True)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_copy_that_fails_ends_the_export_there(lost: int) -> None:
    source = Worker()
    tokens = text(100, 4)
    fill(source, own(A), tokens)
    out = Exchange(source.tiers)
    export = Export(own(A), tokens, 0, 4)
    out.begin_export(export)
    source.copy()
    answers, source.answers = source.answers, []
    for number, (order, value) in enumerate(answers):
        source.tiers.demoted(order.id, int(value), ok=number != lost)
    source.tiers.device.clear()
    out.advance(export)
    assert export.ready and len(export.rows) == lost
    out.end_export(export)
    source.tiers.check(deep=True)


@pytest.mark.parametrize("purged", [A, PUBLIC])
def test_what_was_asked_for_before_a_purge_finds_no_place_after_it(purged: ScopeRoot) -> None:
    source, target = Worker(), Worker()
    tokens, regions = text(100, 4), [Region(PUBLIC, 2 * SIZE), Region(A, None)]
    fill(source, regions, tokens)
    into = Exchange(target.tiers)
    arriving = imported(target, regions, tokens)
    target.tiers.purge(purged)
    assert not into.arrived(arriving, 4)
    into.end_import(arriving)
    assert target.tiers.cpu.num_sealed == 0 == target.tiers.cpu.num_referenced
    assert move(source, target, regions, tokens) == 4


def test_what_was_on_its_way_when_blocks_were_purged_does_not_arrive() -> None:
    """Not even what was whole before, nor behind blocks of another owner."""
    source, target = Worker(), Worker()
    tokens = text(100, 6)
    fill(source, own(A), tokens)
    export = exported(source, own(A), tokens)
    into, arriving = Exchange(target.tiers), imported(target, own(A), tokens)
    assert into.arrived(arriving, 2)
    target.tiers.purge(A)
    assert into.is_void(arriving) and not into.arrived(arriving, 4)
    into.end_import(arriving)
    assert target.tiers.cpu.num_free == target.tiers.cpu.num_blocks
    out = Exchange(source.tiers)
    assert not out.is_void(export)
    source.tiers.purge(A)
    assert out.is_void(export)
    out.end_export(export)
    assert source.tiers.cpu.num_free == source.tiers.cpu.num_blocks
    again = imported(target, own(A), tokens)
    assert len(again.rows) == 6 and into.arrived(again, 6)
    into.end_import(again)


def test_an_export_that_waits_for_copies_ends_when_blocks_are_purged() -> None:
    source = Worker()
    tokens = text(100, 6)
    fill(source, own(A), tokens)
    out, export = Exchange(source.tiers), Export(own(A), tokens, 0, 6)
    out.begin_export(export)
    assert not export.ready
    source.tiers.purge(B)
    out.advance(export)
    assert export.ready
    out.end_export(export)
