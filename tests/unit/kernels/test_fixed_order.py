"""Deterministic mode in plain torch: a row is the same to the last bit in any batch, in any chunk, at any place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import kernels
from kernels import FORMATS, fixed_order, fixed_plan, reference
from kernels.fixed_order import FixedTiles
from tests.kernel_cases import CASES, Case, Problem, leave_window, make_problem

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)


several_threads = pytest.mark.parametrize("threads", [1, 2], indirect=True)


class Fixed:
    """The operations of the mode as a problem runs them."""

    plan_attention = staticmethod(fixed_plan.plan_attention)
    attention = staticmethod(fixed_order.attention)
    sink_attention = staticmethod(fixed_order.sink_attention)
    write_kv = staticmethod(fixed_order.write_kv)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@several_threads
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 31), (80, 96), (144, 1031), (513, 70)])
def test_a_row_of_a_product(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = (normal(*shape, dtype=dtype) for shape in ((307, inputs), (outputs, inputs), (outputs,)))
    packed = FixedTiles(weight)
    together = kernels.linear(x, packed, bias)
    expected = (x.double() @ weight.double().T + bias.double()).to(dtype)
    torch.testing.assert_close(together, expected, atol=inputs * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    rng = np.random.default_rng(inputs)
    for _ in range(40):
        begin = int(rng.integers(0, 307))
        rows = slice(begin, begin + int(rng.choice([1, 2, 3, 15, 16, 17, 130, 200])))
        assert torch.equal(kernels.linear(x[rows], packed, bias), together[rows])


@several_threads
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 31, 96, 144, 1000])
def test_a_row_of_what_is_no_product(width: int, dtype: torch.dtype) -> None:
    """Widths beside those of vectors, and so many rows that threads divide them."""
    x, weight = normal(400, 2 * width, dtype=dtype), normal(width, dtype=dtype)
    heads, of_heads = normal(400, 5, 2 * width, dtype=dtype), normal(3, 2 * width, dtype=dtype)
    angle = normal(400, 1, 1, width)
    cos, sin = angle.cos().expand(-1, -1, 2, -1).to(dtype), (angle.sin() * torch.tensor([[-1.0], [1.0]])).to(dtype)

    def turned(rows: slice) -> torch.Tensor:
        mine = heads[rows].clone()
        reference.head_rms_norm_(mine[:, :3], of_heads, 1e-6)
        reference.rotary_(mine[:, :4], cos[rows], sin[rows])
        return mine

    def angles(rows: slice) -> torch.Tensor:
        return torch.cat((angle[rows].cos(), angle[rows].sin()))

    operations = (
        lambda rows: reference.silu_mul(x[rows]),
        lambda rows: reference.rms_norm(x[rows, :width].contiguous(), weight, 1e-6),
        lambda rows: reference.add_rms_norm(x[rows, :width].clone(), x[rows, width:].clone(), weight, 1e-6)[0],
        turned,
    )
    for operation in operations:
        together = operation(slice(None))
        for begin, count in ((0, 1), (3, 1), (7, 2), (20, 37), (100, 300), (399, 1)):
            assert torch.equal(operation(slice(begin, begin + count)), together[begin : begin + count])
    whole = angle.cos()
    assert all(torch.equal(angle[row : row + 1].cos(), whole[row : row + 1]) for row in range(0, 400, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype, "cpu")
    leave_window(problem)
    result = problem.run(Fixed)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), problem.expected(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


LONG = (
    Case("prompts and decodes", (1, 140, 1, 30, 3, 1), (400, 140, 9, 395, 264, 129)),
    Case("windows over pieces", (1, 150, 1, 60), (400, 250, 200, 77), window=140),
    Case("sinks over pieces", (1, 150, 1, 60), (400, 290, 200, 77), window=40, sinks=13),
    Case("many heads", (1, 20, 1), (200, 150, 33), heads=(20, 1, 16)),
    Case("blocks of no power of two", (1, 150, 7), (400, 290, 27), heads=(6, 2, 24), block_size=24),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_attention_alone_and_in_chunks(case: Case, dtype: torch.dtype) -> None:
    check_parts(make_problem(case, dtype, "cpu"))


@pytest.mark.parametrize("case", [LONG[0], LONG[2]], ids=str)
def test_attention_over_kv_in_fewer_bits(case: Case) -> None:
    check_parts(make_problem(case, torch.float32, "cpu", FORMATS["int8"]))


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
def test_attention_with_several_threads() -> None:
    check_parts(make_problem(LONG[4], torch.float32, "cpu"))


def check_parts(problem: Problem) -> None:
    together = problem.run(Fixed)  # and all keys and values are written
    starts = np.cumsum([0, *problem.case.query_lens]).tolist()
    for index, (begin, end) in enumerate(pairwise(starts)):
        for chunk in (1, 5, 16, end - begin):
            for first in range(begin, min(end, begin + 7 * chunk), chunk):
                rows = slice(first, min(first + chunk, end))
                assert torch.equal(part(problem, index, rows, end - rows.stop), together[rows])


def part(problem: Problem, index: int, rows: slice, left: int) -> torch.Tensor:
    """Some tokens of one sequence as a step of their own."""
    case = problem.case
    count, length = rows.stop - rows.start, case.context_lens[index] - left
    alone = replace(
        problem,
        case=replace(case, query_lens=(count,), context_lens=(length,)),
        block_tables=problem.block_tables[index : index + 1],
        query=problem.query[rows],
        sink_query=problem.sink_query[rows],
        key_value=problem.key_value[rows],
    )
    return alone.run(Fixed)


def test_tiles_of_another_order_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for one row here, and could be for many elsewhere."""
    product = torch.mm

    def many_apart(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        made = product(left, right) * (1 + 2.0**-20 * (len(left) != fixed_order.ROWS))
        return made if out is None else out.copy_(made)

    monkeypatch.setattr(torch, "mm", many_apart)
    x, packed = normal(150, 37), FixedTiles(normal(21, 37))
    assert packed.sizes == (fixed_order.ROWS,)
    together = kernels.linear(x, packed)
    assert torch.equal(kernels.linear(x[5:7], packed), together[5:7])


def test_a_hole_that_is_read() -> None:
    cache = torch.zeros(8, 1, 2, 2, 8, 16)
    tables = np.array([[0, -1, 2]])
    with pytest.raises(ValueError, match="hole"):
        fixed_plan.plan_attention(cache, [1], [20], tables, num_heads=4)
    assert fixed_plan.plan_attention(cache, [1], [20], tables, num_heads=4, windows=[4]).num_tokens == 1


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code where it takes the tensors, as it is: its rows are the same in any batch. Else the fixed order."""
    arguments = ([1], [20], np.array([[0, 1, 2]]))
    weight, cache = torch.randn(4, 4), torch.zeros(8, 1, 2, 2, 8, 16)
    native = kernels.plan_attention(cache, *arguments, num_heads=4, deterministic=True)
    assert not isinstance(native, fixed_plan.FixedPlan)
    assert not isinstance(kernels.pack(weight, deterministic=True), FixedTiles)
    with_sinks = kernels.plan_attention(cache, *arguments, num_heads=4, windows=[8], sinks={8: 2}, deterministic=True)
    assert isinstance(with_sinks, fixed_plan.FixedPlan)
    monkeypatch.setattr(kernels, "_cpu_operations", lambda: reference)
    assert isinstance(kernels.plan_attention(cache, *arguments, num_heads=4, deterministic=True), fixed_plan.FixedPlan)
    assert isinstance(kernels.pack(weight, deterministic=True), FixedTiles)
    assert kernels.pack(weight) is weight
