"""The kernels' case table on CUDA."""

from __future__ import annotations

import pytest
import torch

import kernels
from tests.kernel_cases import CASES, Case, make_problem

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype, "cuda")
    result = problem.run().cpu().double()
    torch.testing.assert_close(result, problem.expected(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_draws_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(64, 1031, generator=generator)
    uniform = kernels.counter_uniform(torch.arange(64), torch.arange(64))
    temperature = torch.ones(64, dtype=torch.float64)
    there = kernels.counter_uniform(torch.arange(64).cuda(), torch.arange(64).cuda())
    assert torch.equal(there.cpu(), uniform)
    drawn = kernels.sample(logits.cuda(), there, temperature.cuda())
    assert torch.equal(drawn.cpu(), kernels.sample(logits, uniform, temperature))
