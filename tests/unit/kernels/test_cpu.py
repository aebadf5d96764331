"""Native CPU operations against plain torch, and each row against itself in another batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import kernels
from kernels import cpu, reference
from kernels.cpu_library import library
from tests.kernel_cases import CASES, Case, make_problem

pytestmark = pytest.mark.usefixtures("compiled")
PLAIN = [case for case in CASES if not case.sinks]


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


def test_other_dtypes_are_not_packed() -> None:
    weight = torch.randn(4, 4, dtype=torch.float16)
    assert kernels.pack(weight) is weight
    assert torch.equal(kernels.linear(weight, weight), weight @ weight.T)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_torch_gives_the_same(case: Case) -> None:
    native = make_problem(case, torch.float32, "cpu").run(cpu)
    plain = make_problem(case, torch.float32, "cpu").run(reference)
    torch.testing.assert_close(native, plain, atol=2e-6, rtol=2e-6)


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


def test_gate_far_out() -> None:
    gate = torch.linspace(-200, 200, 640)
    gate_up = torch.cat((gate, torch.ones(640)))[None]
    torch.testing.assert_close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


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
