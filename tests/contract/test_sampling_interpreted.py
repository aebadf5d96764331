"""All that draws, asked the same table: the kernel in Triton's interpreter, native code on the CPU, and their twin give
the same tokens, to the last."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from kernels import cpu, device, reference
from kernels.configs import SamplingConfig
from kernels.sampling import _NEAR_BITS, SCALE, _nearly_all, weights
from tests.sampling_cases import CASES, Case, make_problem

# Tiny, so that small rows have several tiles and lists of the most likely tokens are soon full.
TINY = SamplingConfig(tile=128, room=64, guide=20, step=64, pivots=64)


@pytest.mark.parametrize("operations", [reference, cpu], ids=["twin", "native"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin_and_native_code(case: Case, operations: ModuleType) -> None:
    problem = make_problem(case)
    assert operations.sample(problem.logits.clone(), problem.draws()).tolist() == problem.expected()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case) -> None:
    problem = make_problem(case)
    with np.errstate(invalid="ignore"):  # what the interpreter computes with
        tokens = device.sample(problem.logits.clone(), problem.draws(), TINY)
    assert tokens.tolist() == problem.expected()


@pytest.mark.parametrize(
    "case", [Case("long", 1500), Case("longer", 6000), Case("long, flat", 5000, spread=0.5)], ids=str
)
def test_twin_that_looks_at_the_most_likely_first(case: Case) -> None:
    problem = make_problem(case)
    assert reference.sample(problem.logits.clone(), problem.draws()).tolist() == problem.expected()


@pytest.mark.parametrize("bits", [3, 60])
def test_totals_that_are_near_decide_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wide margin most rows are looked at again, with none the sum in floating point alone would decide."""
    problem = make_problem(Case("long", 1500, count=2))
    monkeypatch.setattr("kernels.sampling._NEAR_BITS", bits)
    assert reference.sample(problem.logits.clone(), problem.draws()).tolist() == problem.expected()


@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
def test_totals_are_as_near_as_is_said(spread: float) -> None:
    problem = make_problem(Case("long", 20_000, spread=spread))
    values, rows = problem.logits.numpy(), problem.draws().rows.numpy()
    random = rows[:, SCALE] != 0
    values, rows = values[random], rows[random]
    exact = weights(values, values.max(1), rows[:, SCALE].astype(np.int32).view(np.float32)).sum(1)
    assert (np.abs(_nearly_all(values, values.max(1), rows) - exact) <= exact / 2.0 ** (_NEAR_BITS + 1)).all()


def test_logits_are_changed_where_tokens_are_banned_alone() -> None:
    problem = make_problem(Case("banned", 90, banned=40))
    for sample in (reference.sample, device.sample, cpu.sample):
        logits = problem.logits.clone()
        with np.errstate(invalid="ignore"):
            sample(logits, problem.draws())
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[tuple(zip(*problem.banned, strict=True))] = True
        assert torch.equal(logits[~banned], problem.logits[~banned])
        assert (logits[banned] == -torch.inf).all()


def test_rows_may_lie_apart() -> None:
    problem = make_problem(Case("a prime", 61))
    wide = torch.full((len(problem.ways), 80), torch.nan)
    wide[:, :61] = problem.logits
    with np.errstate(invalid="ignore"):
        assert device.sample(wide[:, :61], problem.draws(), TINY).tolist() == problem.expected()


def test_the_most_likely_token() -> None:
    logits = make_problem(Case("not finite", 150, rounded=0.5, poison=True, count=2)).logits
    with np.errstate(invalid="ignore"):
        found = [operations.argmax(logits.clone()).tolist() for operations in (reference, cpu, device)]
    largest = [[value if value == value else -torch.inf for value in row] for row in logits.tolist()]
    assert found == [[row.index(max(row)) for row in largest]] * 3
