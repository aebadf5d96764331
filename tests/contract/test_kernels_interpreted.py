"""The Triton kernels in Triton's interpreter, asked what plain torch is asked. float32 and float16: its bfloat16
arithmetic is wrong. It rounds to fp8 wrongly too; the kernel that writes fp8 does not ask it to. Tiles and pieces are
tiny, so that small cases have several of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import FORMATS, device, reference
from kernels.configs import DecodeConfig, Processor, Tuning, WideConfig
from tests.kernel_cases import CASES, Case, leave_window, make_problem

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
TINY = Tuning(
    DecodeConfig(tile=16, shortest=32),
    *[WideConfig(rows=64, tile=32, shortest=64)] * 2,
    Processor(multiprocessors=6),
    share=True,
)


# An interpreted step of a loop takes milliseconds: the longest windows are left to a GPU.
@pytest.mark.parametrize("case", [case for case in CASES if sum(case.query_lens) < 400], ids=str)
def test_attention(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("case", [case for case in CASES if max(case.context_lens) < 70], ids=str)
def test_attention_in_half_precision(case: Case) -> None:
    check(case, torch.float16)


def check(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype, "cpu")
    leave_window(problem)
    result = problem.run(device, tuned=TINY)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), problem.expected(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", [case for case in CASES if max(case.shared)], ids=str)
def test_sharing_changes_nothing(case: Case) -> None:
    problem = make_problem(case, torch.float32, "cpu")
    plain = problem.run(device, tuned=replace(TINY, share=False))
    torch.testing.assert_close(problem.run(device, tuned=TINY), plain, atol=2e-6, rtol=2e-6)


KEPT = ("mixed, small", "odd heads", "block of 1", "shared prefix, small", "sinks wider than the window")
SMALL = (
    Case("mixed, small", (1, 12, 1, 3), (40, 12, 9, 33)),
    Case("shared prefix, small", (1, 1, 1), (38, 35, 40), shared_blocks=4),
)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["float16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("case", [case for case in (*CASES, *SMALL) if case.name in KEPT], ids=str)
def test_what_is_kept_in_another_format(case: Case, name: str, dtype: torch.dtype) -> None:
    problem, twin = (make_problem(case, dtype, "cpu", FORMATS[name]) for _ in range(2))
    leave_window(problem)
    result = problem.run(device, tuned=TINY)
    torch.testing.assert_close(result.double(), problem.expected(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    leave_window(twin)
    twin.run(reference)
    assert torch.equal(problem.kv_cache.rows, twin.kv_cache.rows)


@pytest.mark.parametrize("name", ["float16", "int8", "fp8", "int4"])
def test_rotated_vectors_are_stored_as_the_twin_stores_them(name: str) -> None:
    """Of all sizes: fp8's smallest numbers, zeros, and what is past the finite."""
    generator = torch.Generator().manual_seed(6)
    heads = torch.randn(12, 8, 32, generator=generator) * torch.logspace(-9, 7, 96).view(12, 8, 1)
    heads[:, :, ::3] *= 0.001
    heads[3] = 0
    angle = torch.randn(12, 1, 1, 16, generator=generator)
    sign = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1)
    cos, sin = angle.cos().expand(-1, -1, 2, -1).contiguous(), angle.sin() * sign
    kept = []
    for operations in (device, reference):
        problem = make_problem(Case("stored", (12,), (20,), heads=(4, 2, 32)), torch.float32, "cpu", FORMATS[name])
        arguments = (problem.kv_cache, (12,), (20,), problem.block_tables)
        plan = operations.plan_attention(*arguments, num_heads=4)
        operations.rotary_write_kv(heads.clone(), cos, sin, problem.kv_cache.layer(1), plan)
        kept.append(problem.kv_cache.rows)
    assert (kept[0] != kept[1]).float().mean() < 0.001  # a product may be fused with a sum, or not


def test_a_vector_that_is_not_finite_has_no_scale() -> None:
    for name in ("int8", "fp8", "int4"):
        problem = make_problem(Case("not finite", (3,), (3,)), torch.float32, "cpu", FORMATS[name])
        problem.key_value[1, 0, 5] = torch.nan
        problem.key_value[1, 3, 6] = torch.inf
        problem.key_value[2, 2, 7] = -torch.inf
        plan = device.plan_attention(problem.kv_cache, (3,), (3,), problem.block_tables, num_heads=4)
        layer = problem.kv_cache.layer(1)
        with np.errstate(invalid="ignore"):  # what the interpreter computes with
            device.write_kv(problem.key_value, layer, plan)
        scales = layer.scales[problem.block_tables[0, 0], :, :, :3].flatten(0, 1).isnan()
        assert scales.nonzero().tolist() == [[0, 1], [2, 2], [3, 1]]
