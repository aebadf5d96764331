"""The kernels' case table against float64, on the CPU. The same table runs on a GPU in tests/gpu."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import FORMATS
from tests.kernel_cases import CASES, Case, leave_window, make_problem

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype, "cpu")
    result = problem.run()
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), problem.expected(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [case for case in CASES if sum(case.query_lens) < 400], ids=str)
def test_attention_over_what_was_kept(case: Case, name: str) -> None:
    """What a format loses it loses when it is written: attention over it is exact."""
    problem = make_problem(case, torch.float32, "cpu", FORMATS[name])
    leave_window(problem)
    torch.testing.assert_close(problem.run().double(), problem.expected(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_attention_in_half_precision_over_what_was_kept(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == "sinks, mixed batch")
    problem = make_problem(case, dtype, "cpu", FORMATS[name])
    result = problem.run()
    assert result.dtype == dtype
    # Values in half precision are rounded a second time when they are read.
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(result.double(), problem.expected(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_write_touches_its_slots_only(case: Case) -> None:
    problem = make_problem(case, torch.float32, "cpu")
    problem.run()
    layer = problem.kv_cache[:, problem.layer]
    for table, context in zip(problem.block_tables, problem.contexts, strict=True):
        for position in range(len(context)):
            written = layer[table[position // case.block_size], :, :, position % case.block_size]
            assert torch.equal(written, context[position].float())
    slots = {(block, offset) for block, offset in (~layer.isnan()).any(2).any(1).any(-1).nonzero().tolist()}
    assert slots == problem.slots()
    others = [index for index in range(problem.kv_cache.shape[1]) if index != problem.layer]
    assert problem.kv_cache[:, others].isnan().all()


@pytest.mark.parametrize("case", [case for case in CASES if len(case.query_lens) > 1], ids=str)
def test_a_sequence_alone_gives_the_same(case: Case) -> None:
    together = make_problem(case, torch.float32, "cpu")
    result = together.run()
    first = 0
    for row, (count, length) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        rows = slice(first, first + count)
        alone = make_problem(case, torch.float32, "cpu")
        alone.case = replace(case, query_lens=(count,), context_lens=(length,))
        alone.block_tables = together.block_tables[row : row + 1]
        alone.kv_cache = together.kv_cache
        alone.query, alone.key_value = together.query[rows], together.key_value[rows]
        alone.sink_query = together.sink_query[rows]
        torch.testing.assert_close(alone.run(), result[rows], atol=2e-6, rtol=2e-6)
        first += count


@pytest.mark.parametrize("case", [case for case in CASES if case.window is not None], ids=str)
def test_blocks_between_sinks_and_window_are_not_read(case: Case) -> None:
    problem = make_problem(case, torch.float32, "cpu")
    leave_window(problem)
    torch.testing.assert_close(problem.run().double(), problem.expected(), atol=2e-6, rtol=2e-6)


def test_some_cases_have_holes() -> None:
    taken = {str(case): leave_window(make_problem(case, torch.float32, "cpu")) for case in CASES}
    assert taken["window, mixed batch"] > 20
    assert taken["sinks, mixed batch"] > 20
    assert taken["sinks over several blocks"] > 5
    assert taken["sinks, block of 1"] > 20
