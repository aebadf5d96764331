"""Native drawing against its twin, to the last token, for this processor and for one without the widest vectors."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from kernels import cpu_calls, cpu_library, cpu_sampling, sampling
from tests.sampling_cases import CASES, Case, make_problem

native = pytest.mark.usefixtures("chosen")
BUILDS = ("native", "x86-64-v3") if platform.machine() == "x86_64" else ("native",)
VOCABS = (1, 2, 7, 15, 16, 17, 31, 100, 127, 128, 129, 500, 1023, 1025, 4099, 9001)
SPREADS = (0.0, 1e-30, 0.1, 1.0, 3.0, 8.0, 100.0, 1e30)
TOP_P = (0.0, 1e-9, 0.1, 0.5, 0.9, 0.99, 0.99999, 1 - 1e-12)


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("c++")
    assert found is not None, "the tests need a C++ compiler"
    return found


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if request.param == "native":
        return cpu_calls.native()
    with pytest.MonkeyPatch.context() as patch:
        flags = [flag.replace("native", request.param) for flag in cpu_library.FLAGS]
        patch.setattr(cpu_library, "FLAGS", tuple(flags))
        library = ctypes.CDLL(str(cpu_library.built(compiler, tmp_path_factory.mktemp("native") / "cache")))
        patch.setattr(cpu_calls, "library", lambda: library)
        return cpu_calls.native.__wrapped__()


@pytest.fixture
def chosen(build: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_sampling, "native", lambda: build)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    kernels.set_num_threads(request.param)
    yield
    kernels.set_num_threads(0)


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    logits = (rng.standard_normal((rows, vocab)) * rng.choice(SPREADS)).astype(np.float32)
    if rng.random() < 0.3:
        logits = np.round(logits)
    if rng.random() < 0.3:
        part = rng.random(logits.shape)
        for value, begin in ((np.nan, 0.0), (-np.inf, 0.1), (0.0, 0.2), (-0.0, 0.3)):
            logits[(begin < part) & (part < begin + 0.05)] = value
        logits[part > 1 - rng.choice((0, 1e-4))] = np.inf
    return -np.abs(logits) if rng.random() < 0.2 else logits


def random_ways(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    def some(share: float, drawn: np.ndarray, otherwise: float) -> np.ndarray:
        return np.where(rng.random(rows) < share, drawn, otherwise)

    temperature = some(0.9, 10.0 ** rng.uniform(-2, 2, rows), 0.0)
    temperature[rng.random(rows) < 0.1] = rng.choice((1e-30, 1e30))
    top_k = some(0.5, np.ceil((1.1 * vocab) ** rng.random(rows)), 0)
    least = some(0.4, 10.0 ** rng.uniform(-12, 0, rows), 0.0)
    return np.stack((temperature, top_k, some(0.6, rng.choice(TOP_P, rows), 1.0), least), axis=1)


@pytest.mark.usefixtures("chosen", "threads")
@pytest.mark.parametrize("seed", range(60))
def test_the_tokens_of_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, vocab = int(rng.integers(1, 41)), int(rng.choice(VOCABS))
    logits = torch.from_numpy(random_logits(rng, rows, vocab))
    keys = np.stack((rng.integers(-(2**63), 2**63 - 1, rows), rng.integers(0, 2**40, rows)), axis=1)
    banned = [(int(rng.integers(rows)), int(rng.integers(vocab))) for _ in range(int(rng.choice((0, 20))))]
    draws = kernels.plan_draws(random_ways(rng, rows, vocab), keys, banned, torch.device("cpu"))
    others = logits.clone()
    with np.errstate(all="ignore"):
        expected = sampling.sample(others, draws)
    assert torch.equal(cpu_sampling.sample(logits, draws), expected)
    assert torch.equal(logits.view(torch.int32), others.view(torch.int32))
    assert torch.equal(cpu_sampling.argmax(logits), sampling.argmax(logits))


@native
@pytest.mark.parametrize("case", [*CASES, Case("long, flat", 5000, spread=0.5)], ids=str)
def test_the_tokens_of_the_table(case: Case) -> None:
    problem = make_problem(case)
    assert cpu_sampling.sample(problem.logits.clone(), problem.draws()).tolist() == problem.expected()


@native
def test_a_row_alone_draws_the_same() -> None:
    problem = make_problem(Case("long", 3000, count=2))
    together, rows = cpu_sampling.sample(problem.logits, problem.draws()), problem.draws().rows
    for row in range(len(rows)):
        alone = kernels.Draws(rows[row : row + 1], torch.zeros((0, 2), dtype=torch.int64))
        assert cpu_sampling.sample(problem.logits[row : row + 1], alone) == together[row]


@native
def test_rows_may_lie_apart() -> None:
    problem = make_problem(Case("a prime", 61))
    wide = torch.full((len(problem.ways), 80), torch.inf)
    wide[:, :61] = problem.logits
    assert cpu_sampling.sample(wide[:, :61], problem.draws()).tolist() == problem.expected()
    assert torch.equal(cpu_sampling.argmax(wide[:, :61]), sampling.argmax(problem.logits))


@native
def test_logits_of_another_kind_go_to_the_twin() -> None:
    problem = make_problem(Case("a prime", 61))
    turned = problem.logits.T.contiguous().T
    assert cpu_sampling.sample(turned, problem.draws()).tolist() == problem.expected()
    assert torch.equal(cpu_sampling.argmax(turned.double()), sampling.argmax(problem.logits))


@native
@pytest.mark.parametrize("banned", [(0, 7), (1, 0), (0, -8)])
def test_a_banned_token_that_is_not_there_is_refused(banned: tuple[int, int]) -> None:
    draws = kernels.plan_draws([(0.0, 0, 1.0, 0.0)], [(0, 0)], [banned], torch.device("cpu"))
    with pytest.raises(IndexError):
        cpu_sampling.sample(torch.zeros(1, 7), draws)


@native
@pytest.mark.parametrize("scale", [1.0, 1.25 * 1.4426950408889634])
def test_weights_to_the_last_bit(scale: float) -> None:
    """Equal tokens can be drawn where `min_p` asks for all that each weighs, and not where it asks for one more."""
    values = -np.random.default_rng(5).uniform(0, 5, 1000).astype(np.float32)
    factor = np.full(1, scale, dtype=np.float32)
    weight = sampling.weights(values[None, :], np.zeros(1, dtype=np.float32), factor)[0]
    logits = torch.from_numpy(np.repeat(values[:, None], 41, axis=1))
    logits[:, 40] = 0.0
    rows = torch.zeros((len(values), sampling.COLUMNS), dtype=torch.int64)
    rows[:, sampling.SCALE], rows[:, sampling.TOP_P] = int(factor.view(np.int32)[0]), sampling.ALL
    rows[:, sampling.SEED], nothing = torch.arange(len(values)), torch.zeros((0, 2), dtype=torch.int64)
    for more in (0, 1):
        rows[:, sampling.MIN_P] = torch.from_numpy(weight + more)
        found = cpu_sampling.sample(logits, kernels.Draws(rows, nothing))
        assert torch.equal(found, sampling.sample(logits, kernels.Draws(rows, nothing)))
        assert bool((found < 40).any()) != bool(more)


@pytest.mark.parametrize("architecture", BUILDS)
def test_no_vectors_are_fused(architecture: str, compiler: str, tmp_path: Path) -> None:
    """A product and a sum that are rounded once together; what is fused of single numbers is compared alone."""
    source, code = cpu_library.SOURCES / "sampling.cpp", tmp_path / "sampling.s"
    flags = [flag.replace("native", architecture) for flag in cpu_library.FLAGS if flag != "-shared"]
    subprocess.run([compiler, *flags, "-S", str(source), "-o", str(code)], check=True)
    assert "sample" in code.read_text()
    assert not re.findall(r"\tvfn?m(?:add|sub)\w*ps\t|\tfml[as]\t", code.read_text())
