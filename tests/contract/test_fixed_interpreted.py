"""Deterministic mode's Triton kernels in Triton's interpreter: what the definitions give, and to the last bit the same
for a token in any step. Tiles and parts are tiny, so that small cases have several of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kernels
from kernels import FORMATS, device
from kernels.fixed_work_list import fixed_work_list
from kernels.step import checked_step
from kernels.work_list import COUNT, END, FIRST, SLOT, START
from tests.contract.test_kernels_interpreted import TINY, TOLERANCE
from tests.kernel_cases import CASES, Case, Problem, leave_window, make_problem
from tests.oracle import make_checkpoint, oracle_logits
from tests.runner_driver import Driver, load, random_tokens

FIXED = replace(TINY, part=64)
LONG = (
    Case("prompt and decodes", (1, 40, 1), (150, 90, 20)),
    Case("window over parts", (1, 40, 1), (150, 190, 20), window=70),
    Case("sinks over parts", (1, 40), (150, 190), window=30, sinks=5),
)


@pytest.mark.parametrize("case", [case for case in CASES if sum(case.query_lens) < 60], ids=str)
def test_attention(case: Case) -> None:
    problem = make_problem(case, torch.float32, "cpu")
    leave_window(problem)
    result = problem.run(device, tuned=FIXED, deterministic=True)
    torch.testing.assert_close(result.double(), problem.expected(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kept", [None, "int8"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_attention_alone_and_in_chunks(case: Case, kept: str | None) -> None:
    problem = make_problem(case, torch.float32, "cpu", None if kept is None else FORMATS[kept])
    together = problem.run(device, tuned=FIXED, deterministic=True)
    for index, (begin, end) in enumerate(pairwise(np.cumsum([0, *case.query_lens]).tolist())):
        for first, last in {(begin, begin + 1), (end - 1, end), (begin, (begin + end + 1) // 2)}:
            assert torch.equal(part(problem, index, slice(first, last), end - last), together[first:last])


def part(problem: Problem, index: int, rows: slice, left: int) -> torch.Tensor:
    """Some tokens of one sequence as a step of their own."""
    count, length = rows.stop - rows.start, problem.case.context_lens[index] - left
    alone = replace(
        problem,
        case=replace(problem.case, query_lens=(count,), context_lens=(length,)),
        block_tables=problem.block_tables[index : index + 1],
        query=problem.query[rows],
        sink_query=problem.sink_query[rows],
        key_value=problem.key_value[rows],
    )
    return alone.run(device, tuned=FIXED, deterministic=True)


@pytest.mark.parametrize("window", [None, 100])
def test_parts_of_a_token_are_in_order_and_cut_at_fixed_positions(window: int | None) -> None:
    step = checked_step(torch.zeros(99, 1, 2, 2, 8, 16), [1, 90, 1], [300, 200, 64], np.arange(120).reshape(3, 40))
    work = fixed_work_list(step, 4, window, 7 if window else 0, FIXED)
    assert not len(work.decode)
    assert not ((work.wide[:, START] // 64) != (work.wide[:, END] - 1) // 64).any()
    owner = {}
    for item in work.wide[work.wide[:, SLOT] >= 0].tolist():
        for number in range(item[COUNT]):
            owner[item[SLOT] + number] = (item[FIRST] + number, item[START], item[END])
    assert sorted(owner) == list(range(work.num_slots))
    for token, first, count in work.merges.tolist():
        mine = [owner[slot] for slot in work.part_slots[first : first + count].tolist()]
        assert {of for of, _, _ in mine} == {token}
        assert all(before[2] <= after[1] for before, after in pairwise(mine))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (200, 70), (33, 130)])
def test_a_product(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(inputs)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((130, inputs), (outputs, inputs), (outputs,))
    )
    together = device.linear(x, weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(together.double(), expected, atol=20 * TOLERANCE[dtype], rtol=20 * TOLERANCE[dtype])
    for rows in (slice(0, 1), slice(7, 9), slice(60, 130), slice(129, 130)):
        assert torch.equal(device.linear(x[rows], weight, bias), together[rows])
    assert torch.equal(device.linear(x, weight, torch.zeros_like(bias)), device.linear(x, weight, None))


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_a_model_whole_in_chunks_and_in_a_batch(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = make_checkpoint(tmp_path, family)
    monkeypatch.setattr(kernels, "_cpu_operations", lambda: device)
    runner = load(tmp_path, deterministic="on")
    driver = Driver(runner)
    prompt = random_tokens(26, seed=3)
    whole = driver.logits(driver.start(prompt))
    torch.testing.assert_close(whole, oracle_logits(oracle, prompt), atol=1e-4, rtol=0)
    assert torch.equal(driver.logits(driver.start(prompt), chunk=11), whole)
    first = driver.start(prompt[:25])
    driver.generate([first], 1)
    batch = [driver.start(prompt, prefix=first, cached=24), driver.start(prompt[:25], prefix=first, cached=24)]
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(kernels, "linear", recorded(drawn))
    driver.step([*batch, driver.start(random_tokens(34, seed=5))])
    assert torch.equal(drawn[-1][:2], whole[[25, 24]])
    runner.close()


def recorded(products: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    linear = kernels.linear

    def made(*arguments: Any) -> torch.Tensor:
        products.append(linear(*arguments))
        return products[-1]

    return made
