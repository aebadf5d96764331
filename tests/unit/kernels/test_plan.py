"""The host's work list: what is grouped, what is refused, how much is gathered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.plan import LARGEST_GATHER, AttentionPlan, plan_attention

CACHE = torch.empty(4096, 2, 2, 2, 16, 32)  # a head row has 512 elements


def plan(query_lens: list[int], context_lens: list[int], window: int | None = None) -> AttentionPlan:
    widths = [-(-length // 16) for length in context_lens]
    tables = np.zeros((len(widths), max(widths)), dtype=np.int64)
    first = 0
    for row, width in enumerate(widths):
        tables[row, :width] = range(first, first + width)
        first += width
    return plan_attention(CACHE, query_lens, context_lens, tables, num_heads=4, windows=[window])


def test_equal_lengths_are_one_group_addressed_by_slice() -> None:
    (group,) = plan([1] * 8, [160] * 8).work[None].decode
    assert group.tokens == slice(0, 8)
    assert group.gather.length == 160
    assert group.gather.dead.numel() == 0


def test_short_sequences_are_not_padded_to_a_long_one() -> None:
    groups = plan([1] * 5, [3200, 64, 64, 64, 64]).work[None].decode
    assert [group.gather.length for group in groups] == [3200, 64]
    assert groups[0].tokens == slice(0, 1)


def test_padding_is_bounded_when_lengths_differ() -> None:
    lengths = [100 * (index + 1) for index in range(30)]
    groups = plan([1] * 30, lengths).work[None].decode
    gathered = sum(group.gather.num_rows * group.gather.length for group in groups)
    assert gathered <= 1.35 * sum(lengths)
    assert len(groups) < 20


def test_a_gather_stays_small_unless_one_sequence_needs_more() -> None:
    for group in plan([1] * 40, [1600] * 40).work[None].decode:
        elements = group.gather.head_rows.numel() * 16 * 32
        assert elements <= LARGEST_GATHER
    (single,) = plan([1], [32000]).work[None].decode
    assert single.gather.length == 32000


def test_every_token_is_in_exactly_one_part() -> None:
    work = plan([1, 3, 1, 700, 1], [20, 3, 900, 800, 33]).work[None]
    tokens: list[int] = []
    for part in (*work.decode, *(tile for chunk in work.prefill for tile in chunk.tiles)):
        every = torch.arange(706)
        tokens += every[part.tokens].tolist()
    assert sorted(tokens) == list(range(706))


def test_blocks_before_the_window_are_not_gathered() -> None:
    (group,) = plan([1], [1000], window=20).work[20].decode
    assert group.gather.length == 32  # positions 976 to 1007
    (chunk,) = plan([10], [1000], window=20).work[20].prefill
    assert chunk.gather.length == 48  # positions 960 to 1007; the first query sees 971


def test_windows_of_several_layers_share_one_plan() -> None:
    tables = np.arange(8, dtype=np.int64)[None]
    made = plan_attention(CACHE, [1], [100], tables, num_heads=4, windows=[None, 20, None, 20])
    assert set(made.work) == {None, 20}


@pytest.mark.parametrize(("query_lens", "context_lens"), [([0], [5]), ([6], [5]), ([1], [33])])
def test_impossible_lengths_are_refused(query_lens: list[int], context_lens: list[int]) -> None:
    with pytest.raises(ValueError):
        plan_attention(CACHE, query_lens, context_lens, np.zeros((1, 2), dtype=np.int64), num_heads=4)


def test_sinks_are_planned_for_sequences_past_the_window_only() -> None:
    tables = np.arange(3 * 64, dtype=np.int64).reshape(3, 64)
    made = plan_attention(CACHE, [1, 1, 8], [1000, 32, 36], tables, num_heads=4, windows=[32], sinks={32: 20})
    assert [group.gather.num_rows for group in made.work[32].decode] == [1]
    assert not made.work[32].prefill
    work = made.sink_work[32]
    assert [group.gather.length for group in work.window.decode] == [48]
    assert [group.gather.length for group in work.sinks.decode] == [32]  # 20 positions, in two blocks
    (tile,) = work.sinks.prefill[0].tiles
    assert (tile.tokens, tile.keys) == (slice(6, 10), slice(0, 4))  # positions 32 to 35, which left 0 to 3 behind


def test_without_a_longer_sequence_sinks_cost_nothing() -> None:
    tables = np.arange(64, dtype=np.int64)[None]
    assert plan_attention(CACHE, [1], [32], tables, num_heads=4, windows=[32], sinks={32: 4}).sink_work == {}


@pytest.mark.parametrize("hole", [0, 60, 62])
def test_a_hole_where_it_is_read_or_written_is_refused(hole: int) -> None:
    tables = np.arange(64, dtype=np.int64)[None]
    tables[0, 1:60] = -1
    plan_attention(CACHE, [1], [1000], tables, num_heads=4, windows=[32], sinks={32: 16})
    tables[0, hole] = -1
    with pytest.raises(ValueError, match="hole"):
        plan_attention(CACHE, [1], [1000], tables, num_heads=4, windows=[32], sinks={32: 16})
