"""Draws, in native code and by the twin: the generator's published vectors, the distribution, and independence of the
batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kernels
from kernels import cpu, reference
from kernels.sampling import philox, portion, uniform_bits, weights

both = pytest.mark.usefixtures("face")

# Known answers of philox4x32-10 that Random123 publishes: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.fixture(params=[cpu, reference], ids=["native", "twin"])
def face(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_cpu_operations", lambda: request.param)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_philox_known_answers() -> None:
    counters, keys, expected = (np.array([words(row[column]) for row in KNOWN]) for column in range(3))
    assert np.array_equal(philox(counters, keys), expected)


def test_uniform_uses_every_bit_of_the_seed_and_the_position() -> None:
    seeds = np.array([0, 1, 1 << 32, -1, 0, 0])
    positions = np.array([0, 0, 0, 0, 1, 1 << 32])
    assert len(set(uniform_bits(seeds, positions).tolist())) == 6


def test_uniform_is_uniform() -> None:
    draws = uniform_bits(np.full(20_000, 7), np.arange(20_000)) / 2.0**53
    assert draws.min() >= 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, 0.1 %


def test_a_portion_is_exact() -> None:
    rng = np.random.default_rng(3)
    fractions = np.append(rng.integers(0, 2**53 + 1, 500), [0, 1, 2**53 - 1, 2**53])
    totals = np.append(rng.integers(0, 2**60, 500), [2**60, 2**60, 2**60, 2**60])
    found = portion(fractions, totals).tolist()
    assert found == [f * t >> 53 for f, t in zip(fractions.tolist(), totals.tolist(), strict=True)]


def test_weights_are_those_of_a_softmax() -> None:
    values = np.linspace(-26, 0, 5000, dtype=np.float32)[None, :]
    scale = np.array([1.4426950408889634], dtype=np.float32)
    ours = weights(values, np.zeros(1, dtype=np.float32), scale)[0] / 2.0**40
    exact = np.exp(values[0].astype(np.float64))
    assert ours[-1] == 1
    assert (np.abs(ours - exact) <= 3e-6 * exact + 2.0**-40).all()
    assert not weights(np.full((1, 3), -np.inf, dtype=np.float32), np.zeros(1, dtype=np.float32), scale).any()


def draw(logits: torch.Tensor, count: int, temperature: float = 1.0, **filters: float) -> torch.Tensor:
    kept = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    return sample(logits.expand(count, -1), [(temperature, *kept.values())] * count, [(3, n) for n in range(count)])


def sample(logits: torch.Tensor, ways: list[tuple[float, ...]], keys: list[tuple[int, int]]) -> torch.Tensor:
    return kernels.sample(logits, kernels.plan_draws(np.array(ways), np.array(keys), (), torch.device("cpu")))


def filters(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> dict[str, float]:
    return {"top_k": top_k, "top_p": top_p, "min_p": min_p}


@both
@pytest.mark.parametrize("extra", [{}, filters(), filters(top_k=5), filters(top_p=0.7), filters(min_p=0.2)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution(extra: dict[str, float], temperature: float) -> None:
    count = 20_000
    logits = torch.tensor([0.3, -1.0, 2.0, 1.0, 0.9, 0.0, -3.0, 1.5])
    weights = torch.softmax(logits.double() / temperature, -1)
    ranked, order = weights.sort(descending=True)
    kept = torch.ones(8, dtype=torch.bool)
    if extra:
        kept &= torch.arange(8) < (extra["top_k"] or 8)
        kept &= ranked.cumsum(0) - ranked < extra["top_p"]
        kept &= ranked >= extra["min_p"] * ranked[0]
    expected = torch.zeros(8, dtype=torch.float64).scatter(0, order, ranked * kept)
    expected /= expected.sum()
    counts = torch.bincount(draw(logits, count, temperature, **extra), minlength=8)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((counts - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, 0.1 %


@both
def test_filters_apply_one_after_the_other() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two that top_k leaves, the first holds 4/7 of the probability: enough for a top_p of a half.
    assert set(draw(logits, 500, **filters(top_k=2, top_p=0.5)).tolist()) == {0}
    assert set(draw(logits, 500, **filters(top_k=2, top_p=0.6)).tolist()) == {0, 1}
    assert set(draw(logits, 500, **filters(top_p=0.8, min_p=0.7)).tolist()) == {0, 1}


@both
@pytest.mark.parametrize("extra", [filters(top_k=1), filters(top_p=1e-9), filters(top_p=0.0), filters(min_p=1.0)])
def test_the_most_likely_token_is_always_left(extra: dict[str, float]) -> None:
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0])
    assert set(draw(logits, 50, **extra).tolist()) == {2}


@both
def test_equal_tokens_keep_their_order() -> None:
    assert set(draw(torch.zeros(1000), 300, **filters(top_k=3)).tolist()) == {0, 1, 2}


@both
@pytest.mark.parametrize("extra", [{}, filters(top_k=40, top_p=0.95, min_p=0.01)], ids=["plain", "filtered"])
def test_a_row_alone_draws_the_same(extra: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(33, 1031, generator=generator)
    kept = tuple((filters() | extra).values())
    ways = [(0.2 + 0.05 * row, *kept) for row in range(33)]
    keys = [(row, 5 * row) for row in range(33)]
    together = sample(logits, ways, keys)
    for row in range(33):
        one = slice(row, row + 1)
        assert sample(logits[one], ways[one], keys[one]) == together[row]


@pytest.mark.parametrize("extra", [{}, filters(top_p=0.999)], ids=["plain", "filtered"])
@pytest.mark.parametrize("uniform", [0, 2**53 - 1])
def test_banned_tokens_are_never_drawn_at_the_ends(
    extra: dict[str, float], uniform: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.sampling.uniform_bits", lambda seeds, _: np.full_like(seeds, uniform))
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    draws = kernels.plan_draws([(1.0, *(filters() | extra).values())], [(0, 0)], (), logits.device)
    token = reference.sample(logits, draws)
    assert token.item() == (1 if uniform == 0 else 3)
