"""The Triton kernels' work: a token's keys are covered once, whatever is cut or shared; sharing only where it pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.configs import DecodeConfig, Processor, Tuning, WideConfig, tuning
from kernels.prefix_tree import Shape, shared_nodes
from kernels.step import Step, checked_step
from kernels.work_list import COUNT, END, FEWEST, FIRST, MOST, SEQUENCE, SLOT, START, WorkList, work_list

TINY = Tuning(
    DecodeConfig(tile=16, shortest=16),
    *[WideConfig(rows=16, tile=16, shortest=32)] * 2,
    Processor(multiprocessors=8),
    share=True,
)
CACHE = torch.empty(1, 2, 2, 2, 4, 16)  # block size 4, 2 key heads
NUM_HEADS = 6


def seen(step: Step, made: WorkList) -> dict[int, list[tuple[int, int]]]:
    """(sequence's own block, offset) that each token reads, as often as it reads it."""
    found: dict[int, list[tuple[int, int]]] = {token: [] for token in range(step.num_tokens)}
    _, positions = step.positions()
    size = step.block_size

    def read(token: int, sequence: int, keys: range) -> None:
        found[token] += [(int(step.block_tables[sequence, key // size]), key % size) for key in keys]

    for token, sequence, start, end, *_ in made.decode.tolist():
        read(token, sequence, range(start, end))
    for item in made.wide.tolist():
        for token in made.tokens[item[FIRST] : item[FIRST] + item[COUNT]].tolist():
            at = int(positions[token])
            keys = range(max(item[START], at - item[MOST]), min(item[END], at - item[FEWEST] + 1))
            read(token, item[SEQUENCE], keys)
    return found


def slots(made: WorkList) -> dict[int, list[int]]:
    """The part slots that are written for each token."""
    found: dict[int, list[int]] = {}
    for token, _, _, _, slot, _, _, num_parts in made.decode.tolist():
        if num_parts != 1:
            found.setdefault(token, []).append(slot)
    for item in made.wide.tolist():
        for row in range(item[COUNT] if item[SLOT] >= 0 else 0):
            found.setdefault(int(made.tokens[item[FIRST] + row]), []).append(item[SLOT] + row)
    return found


@st.composite
def steps(draw: st.DrawFn) -> tuple[Step, int | None, int]:
    """Sequences of a tree: each begins as one before it."""
    window = draw(st.sampled_from([None, None, 1, 5, 17]))
    sinks = draw(st.integers(0, 9)) if window else 0
    lens, contexts, tables, fresh = [], [], [], 0
    for _ in range(draw(st.integers(1, 7))):
        context = draw(st.integers(1, 120))
        width = -(-context // 4)
        table: list[int] = []
        if tables:
            other = draw(st.integers(0, len(tables) - 1))
            most = min((context - 1) // 4, (contexts[other] - 1) // 4)
            table = tables[other][: draw(st.integers(0, most))]
        own = width - len(table)
        table, fresh = table + list(range(fresh, fresh + own)), fresh + own
        lens.append(draw(st.sampled_from([1, 1, 1, min(context, 7), context])))
        contexts.append(context)
        tables.append(table)
    padded = np.full((len(tables), max(map(len, tables)) + 1), -1, dtype=np.int64)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    return checked_step(CACHE, lens, contexts, padded), window, sinks


@given(steps())
@settings(max_examples=150, deadline=None)
def test_every_key_is_read_once_by_every_token_that_sees_it(made: tuple[Step, int | None, int]) -> None:
    step, window, sinks = made
    work = work_list(step, NUM_HEADS, window, sinks, TINY)
    sequences, positions = step.positions()
    for token, read in seen(step, work).items():
        at, table = int(positions[token]), step.block_tables[sequences[token]]
        first = 0 if window is None else max(0, at - window + 1)
        keys = [*range(min(sinks, first)), *range(first, at + 1)]
        assert sorted(read) == sorted((int(table[key // 4]), key % 4) for key in keys)


def test_what_is_shared_is_read_once() -> None:
    common = np.tile(np.arange(9), (5, 1))
    step = checked_step(CACHE, [1] * 5, [38] * 5, np.concatenate((common, 9 + np.arange(5)[:, None]), axis=1))
    work = work_list(step, NUM_HEADS, None, 0, TINY)
    assert {(start, end) for _, _, start, end, *_ in work.decode.tolist()} == {(36, 38)}
    assert sorted((item[START], item[END]) for item in work.wide.tolist()) == [(0, 36)]


@given(steps())
@settings(max_examples=150, deadline=None)
def test_part_slots_name_what_is_written(made: tuple[Step, int | None, int]) -> None:
    step, window, sinks = made
    work = work_list(step, NUM_HEADS, window, sinks, TINY)
    written = slots(work)
    assert sorted(slot for of in written.values() for slot in of) == list(range(work.num_slots))
    named: dict[int, list[int]] = {}
    for token, *_, first, num_parts in work.decode.tolist():
        if num_parts > 1:
            assert sum(other[0] == token for other in work.decode.tolist()) == num_parts
            named[token] = work.part_slots[first : first + num_parts].tolist()
    for token, first, num_parts in work.merges.tolist():
        assert token not in named
        named[token] = work.part_slots[first : first + num_parts].tolist()
    assert {token: sorted(of) for token, of in named.items()} == {token: sorted(of) for token, of in written.items()}


EIGHT_B = Shape(num_heads=32, num_kv_heads=8, head_dim=128, block_size=16, itemsize=2)


def tables(count: int, shared: int, own: int) -> tuple[np.ndarray, np.ndarray]:
    common = np.tile(np.arange(shared), (count, 1))
    private = shared + np.arange(count * own).reshape(count, own)
    return np.concatenate((common, private), axis=1), np.full(count, shared + own - 1)


def test_a_long_prefix_of_many_is_read_once() -> None:
    [node] = shared_nodes(*tables(64, 128, 16), EIGHT_B, tuning(128, 2))
    assert (node.first, node.end) == (0, 128)
    assert node.rows.tolist() == list(range(64))


@pytest.mark.parametrize(("count", "shared"), [(64, 1), (2, 8), (1, 500), (3, 0)])
def test_what_saves_less_than_a_launch_is_not(count: int, shared: int) -> None:
    assert shared_nodes(*tables(count, shared, 4), EIGHT_B, tuning(128, 2)) == []


def test_groups_within_a_group() -> None:
    made, lengths = tables(64, 600, 16)
    for group in range(4):
        made[group * 16 : group * 16 + 16, 300:600] = 100_000 + group * 1000 + np.arange(300)
    nodes = shared_nodes(made, lengths, EIGHT_B, tuning(128, 2))
    assert sorted((node.first, node.end, len(node.rows)) for node in nodes) == [(0, 300, 64)] + [(300, 600, 16)] * 4


def test_only_equal_tables_are_shared_never_equal_blocks_elsewhere() -> None:
    made, lengths = tables(8, 0, 200)
    made[:, 1:100] = np.arange(1, 100)  # behind a first block of their own
    assert shared_nodes(made, lengths, EIGHT_B, tuning(128, 2)) == []
