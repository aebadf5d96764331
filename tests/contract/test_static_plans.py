"""Plans in buffers that stay: in Triton's interpreter, a step in a larger plan's buffers gives what it gives alone, and
what fills up the buffers writes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench.kernels.shapes import SHAPES, Shape
from kernels import FORMATS, device
from kernels.configs import DecodeConfig, Processor, Tuning, WideConfig, tuning
from kernels.static_plan import StaticPlans
from tests.kernel_cases import CASES, Case, Problem, layer_of, leave_window, make_problem

TINY = Tuning(
    DecodeConfig(tile=16, shortest=32),
    *[WideConfig(rows=64, tile=32, shortest=64)] * 2,
    Processor(multiprocessors=6),
    share=True,
)
DECODES = [case for case in CASES if max(case.query_lens) == 1 and sum(case.context_lens) < 1200]


def static(problem: Problem, sizes: tuple[int, ...], tuned: Tuning = TINY, **options: Any) -> StaticPlans:
    case = problem.case
    sinks = {case.window: case.sinks} if case.window is not None else None
    return StaticPlans(
        problem.kv_cache, sizes, num_heads=case.heads[0], windows=[case.window], sinks=sinks, tuned=tuned, **options
    )


def arguments(problem: Problem) -> tuple[np.ndarray, ...]:
    case = problem.case
    lens = (np.array(case.query_lens), np.array(case.context_lens))
    return (np.arange(len(case.query_lens)) + 7, *lens, problem.block_tables)


def padded(rows: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat((rows, torch.full((batch - len(rows), *rows.shape[1:]), torch.nan, dtype=rows.dtype)))


def run(problem: Problem, plans: StaticPlans) -> torch.Tensor:
    """As `Problem.run`, with the plan filled in, rows past the step's being NaN."""
    key = plans.filled(*arguments(problem))
    assert key is not None
    made, case = plans.plans[key], problem.case
    count, layer_kv = len(case.query_lens), layer_of(problem.kv_cache, problem.layer)
    assert made.token_ids[:count].tolist() == list(range(7, 7 + count))
    query, sink_query, key_value = (
        padded(rows, key[0]) for rows in (problem.query, problem.sink_query, problem.key_value)
    )
    device.write_kv(key_value, layer_kv, made.plan)
    scale = query.shape[2] ** -0.5
    if case.sinks:
        out = device.sink_attention(query, sink_query, layer_kv, made.plan, scale=scale, window=case.window)
    else:
        out = device.attention(query, layer_kv, made.plan, scale=scale, window=case.window)
    assert not made.plan.counters.any()
    return out[:count]


@pytest.mark.parametrize("case", DECODES, ids=str)
def test_a_larger_plan_gives_the_same(case: Case) -> None:
    alone, ours = (make_problem(case, torch.float32, "cpu") for _ in range(2))
    for problem in (alone, ours):
        leave_window(problem)
    expected = alone.run(device, tuned=replace(TINY, many=TINY.wide))
    with np.errstate(invalid="ignore"):  # rows of NaN
        found = run(ours, static(ours, (len(case.query_lens) + 3,)))
    assert torch.equal(found, expected)
    assert torch.equal(ours.kv_cache.isnan(), alone.kv_cache.isnan())
    assert torch.equal(ours.kv_cache.nan_to_num(), alone.kv_cache.nan_to_num())


@pytest.mark.filterwarnings("ignore:All-NaN")  # rows that fill up
def test_kv_in_fewer_bits_is_written_nowhere_else() -> None:
    case = Case("few", (1, 1), (9, 20))
    alone, ours = (make_problem(case, torch.float32, "cpu", FORMATS["int8"]) for _ in range(2))
    expected = alone.run(device, tuned=TINY)
    with np.errstate(invalid="ignore"):
        assert torch.equal(run(ours, static(ours, (4,))), expected)
    assert torch.equal(ours.kv_cache.rows, alone.kv_cache.rows)


def test_buffers_are_used_again() -> None:
    """A long step with much of everything, then a short one: nothing is left of the first."""
    case = next(case for case in DECODES if case.name == "shared prefixes in a tree")
    first = make_problem(case, torch.float32, "cpu")
    plans = static(first, (8,))
    addresses = [
        (made.token_ids.data_ptr(), made.plan.slots.data_ptr(), made.plan.work[None].decode.data_ptr())
        for made in plans.plans.values()
    ]
    with np.errstate(invalid="ignore"):
        run(first, plans)
        short = make_problem(replace(case, query_lens=(1, 1), context_lens=(70, 66), tree=(8, 8)), torch.float32, "cpu")
        short.kv_cache = first.kv_cache  # what a plan was made for is not looked at again
        again = make_problem(short.case, torch.float32, "cpu")
        first.kv_cache.copy_(padded(again.kv_cache, len(first.kv_cache)))
        short.block_tables = again.block_tables
        assert torch.equal(run(short, plans), again.run(device, tuned=replace(TINY, many=TINY.wide)))
    assert addresses == [
        (made.token_ids.data_ptr(), made.plan.slots.data_ptr(), made.plan.work[None].decode.data_ptr())
        for made in plans.plans.values()
    ]


def test_the_smallest_size_that_fits_is_taken() -> None:
    problem = make_problem(Case("three", (1,) * 3, (5, 9, 12)), torch.float32, "cpu")
    token_ids, query_lens, context_lens, tables = arguments(problem)
    plans = static(problem, (8, 1, 4, 2), replace(TINY, share=False))
    assert list(plans.plans) == [(1, False), (2, False), (4, False), (8, False)]
    for count, size in ((1, 1), (2, 2), (3, 4)):
        rows = slice(0, count)
        key = plans.filled(token_ids[rows], query_lens[rows], context_lens[rows], tables[rows])
        assert key == (size, False)
        plan = plans.plans[key].plan
        assert plan.slots[count:].tolist() == [-1] * (size - count)
        assert plan.positions[:count].tolist() == (context_lens[rows] - 1).tolist()


def test_what_does_not_fit_is_refused() -> None:
    problem = make_problem(Case("three", (1,) * 3, (5, 90, 12)), torch.float32, "cpu")
    token_ids, query_lens, context_lens, tables = arguments(problem)
    assert static(problem, (1, 2)).filled(token_ids, query_lens, context_lens, tables) is None
    assert static(problem, (4,), max_blocks=2).filled(token_ids, query_lens, context_lens, tables) is None
    mixed = np.array([1, 4, 1])
    assert static(problem, (4,)).filled(np.arange(6), mixed, context_lens, tables) is None
    small = replace(TINY, decode=DecodeConfig(tile=16, shortest=16, resident=200))
    with_room = static(problem, (4,), small)
    assert with_room.filled(token_ids, query_lens, context_lens, tables) is not None
    long = make_problem(Case("long", (1,), (900,), heads=(4, 4, 16)), torch.float32, "cpu")
    narrow = replace(TINY, decode=DecodeConfig(tile=16, shortest=16, resident=3))
    plans = static(long, (1,), narrow)
    plans._tuned = replace(small, many=small.wide)  # cuts finer than the lists have room for
    assert plans.filled(*arguments(long)) is None


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if max(shape.query_lens) == 1], ids=lambda s: s.name)
def test_shapes_that_are_timed_fit(shape: Shape) -> None:
    num_heads, num_kv_heads, head_dim = shape.heads
    count, width, shared = len(shape.context_lens), -(-max(shape.context_lens) // 16), shape.shared // 16
    tables = np.arange(count * width).reshape(count, width)
    for row in range(count):
        tables[row, :shared] = tables[row % shape.groups, :shared]
    kv_cache = torch.empty((1, 1, 2, num_kv_heads, 16, head_dim), dtype=torch.bfloat16)
    plans = StaticPlans(kv_cache, (count,), num_heads=num_heads, tuned=tuning(head_dim, 2))
    lens = (np.array(shape.query_lens), np.array(shape.context_lens))
    key = plans.filled(np.zeros(count, dtype=np.int64), *lens, tables)
    assert key == (count, shape.name.startswith("C") and shape.name != "C6")
