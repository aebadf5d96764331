"""Native CPU operations against plain torch, and each row against itself in another batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

import kernels
from kernels import cpu, reference
from kernels.cpu_library import library
from kernels.cpu_plan import CpuPlan
from tests.kernel_cases import CASES, Case, make_problem

pytestmark = pytest.mark.usefixtures("compiled")
FAMILY = Case(
    "long shared prefixes in a tree",
    (1,) * 6,
    (350, 330, 300, 420, 170, 140),
    tree=(40, 40, 20, 40, 20, 16),
)
PLAIN = [case for case in (*CASES, FAMILY) if not case.sinks]


@pytest.fixture(scope="module")
def compiled() -> None:
    assert library() is not None, "the tests need a C++ compiler"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("outputs", [1, 31, 32, 33, 96])
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 97, 200])
def test_linear_is_the_product(rows: int, outputs: int) -> None:
    x, weight, bias = torch.randn(rows, 50), torch.randn(outputs, 50), torch.randn(outputs)
    packed = kernels.pack(weight)
    assert isinstance(packed, cpu.PackedWeight)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(kernels.linear(x, packed), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(kernels.linear(x, packed, bias), expected + bias, atol=2e-5, rtol=2e-5)


def test_a_row_of_a_product_is_the_same_in_any_batch() -> None:
    x, packed = torch.randn(130, 64), kernels.pack(torch.randn(70, 64))
    together = kernels.linear(x, packed)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 20), slice(90, 130)):
        assert torch.equal(kernels.linear(x[rows], packed), together[rows])


@pytest.mark.parametrize("rows", [1, 40])
def test_products_of_bfloat16(rows: int) -> None:
    x, weight = torch.randn(rows, 50).bfloat16(), torch.randn(70, 50).bfloat16()
    packed = kernels.pack(weight)
    expected = (x.double() @ weight.double().T).bfloat16()
    torch.testing.assert_close(kernels.linear(x, packed), expected, atol=0.02, rtol=0.02)
    gated = reference.silu_mul(x.double() @ weight.double().T).bfloat16()
    torch.testing.assert_close(kernels.gated_linear(x, kernels.pack(weight, gated=True)), gated, atol=0.02, rtol=0.02)


def test_numbers_of_another_dtype_are_refused() -> None:
    packed = kernels.pack(torch.randn(4, 4))
    with pytest.raises(ValueError, match="does not go with a weight"):
        kernels.linear(torch.randn(1, 4, dtype=torch.float64), packed)


def test_other_dtypes_are_not_packed() -> None:
    weight = torch.randn(4, 4, dtype=torch.float16)
    assert kernels.pack(weight) is weight
    assert torch.equal(kernels.linear(weight, weight), weight @ weight.T)


@pytest.mark.parametrize("case", [*CASES, FAMILY], ids=str)
def test_plain_torch_gives_the_same(case: Case) -> None:
    native = make_problem(case, torch.float32, "cpu").run(cpu)
    plain = make_problem(case, torch.float32, "cpu").run(reference)
    torch.testing.assert_close(native, plain, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_bfloat16_is_near_to_exact_sums(case: Case) -> None:
    problem = make_problem(case, torch.bfloat16, "cpu")
    torch.testing.assert_close(problem.run(cpu).double(), problem.expected(), atol=0.02, rtol=0.02)


def test_what_is_shared_is_planned_for_once() -> None:
    problem = make_problem(FAMILY, torch.float32, "cpu")
    lens = (FAMILY.query_lens, FAMILY.context_lens, problem.block_tables)
    kernels.set_num_threads(1)
    plan = cpu.plan_attention(problem.kv_cache, *lens, num_heads=4)
    kernels.set_num_threads(0)
    assert isinstance(plan, CpuPlan)
    assert plan.teams.tolist() == [0, 6]
    assert sorted(plan.members[:, 0].tolist()) == list(range(6))


@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(threads: int, dtype: torch.dtype) -> None:
    x, packed = torch.randn(300, 64).to(dtype), kernels.pack(torch.randn(530, 64).to(dtype))
    one, alone = kernels.linear(x, packed), make_problem(FAMILY, dtype, "cpu").run(cpu)
    kernels.set_num_threads(threads)
    try:
        for _ in range(200):
            assert torch.equal(kernels.linear(x, packed), one)
        assert torch.equal(make_problem(FAMILY, dtype, "cpu").run(cpu), alone)
        with ThreadPoolExecutor(4) as callers:
            results = list(callers.map(lambda _: kernels.linear(x, packed), range(100)))
        assert all(torch.equal(result, one) for result in results)
    finally:
        kernels.set_num_threads(0)


@pytest.mark.parametrize("case", [case for case in PLAIN if len(case.query_lens) > 1], ids=str)
def test_a_sequence_is_the_same_to_the_last_bit_in_any_batch(case: Case) -> None:
    together = make_problem(case, torch.float32, "cpu")
    result = together.run(cpu)
    first = 0
    for row, (count, length) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        # Alone, and of a chunk its last token only.
        for rows, queries in ((slice(first, first + count), count), (slice(first + count - 1, first + count), 1)):
            alone = make_problem(case, torch.float32, "cpu")
            alone.case = replace(case, query_lens=(queries,), context_lens=(length,))
            alone.block_tables, alone.kv_cache = together.block_tables[row : row + 1], together.kv_cache
            alone.query, alone.key_value = together.query[rows], together.key_value[rows]
            assert torch.equal(alone.run(cpu), result[rows])
        first += count


def test_a_hole_that_is_read_is_refused() -> None:
    cache = torch.zeros(4, 1, 2, 1, 8, 16)
    with pytest.raises(ValueError, match="hole"):
        cpu.plan_attention(cache, [1], [20], np.array([[0, -1, 2]], dtype=np.int32), num_heads=2)


@pytest.mark.parametrize("width", [8, 50, 64])
@pytest.mark.parametrize("rows", [1, 40])
def test_norms(rows: int, width: int) -> None:
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    normed, summed = cpu.add_rms_norm(x, residual.clone(), weight, 1e-5)
    expected, total = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    torch.testing.assert_close(normed, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(summed, total)
    alone = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(cpu.rms_norm(x, weight, 1e-5), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("rows", [1, 13, 97])
def test_gated_linear(rows: int, outputs: int) -> None:
    x, weight, bias = torch.randn(rows, 50), torch.randn(2 * outputs, 50), torch.randn(2 * outputs)
    for added in (None, bias):
        expected = reference.silu_mul(torch.nn.functional.linear(x.double(), weight.double(), _double(added))).float()
        result = kernels.gated_linear(x, kernels.pack(weight, gated=True), added)
        torch.testing.assert_close(result, expected, atol=3e-5, rtol=3e-5)


def _double(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.double()


def test_gates_far_out() -> None:
    gate = torch.linspace(-200, 200, 640)
    weight = torch.stack((gate, torch.zeros(640)), dim=1)
    weight = torch.cat((weight, torch.tensor([[0.0, 1.0]]).repeat(640, 1)))
    gated = kernels.gated_linear(torch.ones(1, 2), kernels.pack(weight, gated=True))
    torch.testing.assert_close(gated, torch.nn.functional.silu(gate)[None])


def test_rotation_and_write() -> None:
    caches = [torch.zeros(6, 2, 2, 2, 8, 16) for _ in range(2)]
    heads, angle = torch.randn(41, 3 + 4, 16), torch.randn(41, 1, 1, 8)
    sign = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1)
    cos, sin = angle.cos().expand(-1, -1, 2, -1), angle.sin() * sign
    table = np.array([[5, 3, 0, 1, 2, 4]], dtype=np.int32)
    results = []
    for cache, operations in zip(caches, (cpu, reference), strict=True):
        turned = heads.clone()
        plan = operations.plan_attention(cache, [41], [44], table, num_heads=3)
        operations.rotary_write_kv(turned, cos, sin, cache[:, 1], plan)
        results.append(turned[:, :3])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*caches)


@pytest.mark.parametrize(
    ("lens", "contexts", "tables"),
    [
        ([200_000, -199_999], [200_000, 5], [[0] * 50_001] * 2),
        ([3, -1], [3, 5], [[0, 1]] * 2),
        ([0], [3], [[0]]),
        ([4], [3], [[0]]),
        ([1, 1], [1, 1], [[0]]),
        ([1], [1, 1], [[0]]),
        ([1], [1], [[0], [1]]),
        ([1], [9], [[0]]),
        ([1], [1], [[1 << 31]]),
    ],
)
def test_a_step_that_cannot_be_is_refused_before_anything_is_written(
    lens: list[int], contexts: list[int], tables: list[list[int]]
) -> None:
    cache = torch.zeros(4, 1, 2, 1, 8, 16)
    with pytest.raises(ValueError, match=r"sequence|table"):
        cpu.plan_attention(cache, lens, contexts, np.array(tables), num_heads=2)
