"""The Triton kernels in Triton's interpreter, asked what plain torch is asked. float32 and float16: its bfloat16
arithmetic is wrong. Tiles and pieces are tiny, so that small cases have several of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import device
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
