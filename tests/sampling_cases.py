"""The case table of drawing tokens, and what each row must draw: told plainly, row by row, in Python's integers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

import kernels
from kernels.sampling import POLYNOMIAL, SCALE, uniform_bits

# temperature, top_k, top_p, min_p
WAYS = (
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 0, 0.6, 0.0),
    (1.3, 0, 0.97, 0.0),
    (0.9, 0, 1.0, 0.05),
    (1.0, 12, 0.8, 0.02),
    (2.0, 3, 0.99, 0.5),
    (1.0, 1, 1.0, 0.0),
    (0.8, 0, 0.0, 0.0),
    (0.8, 0, 1e-9, 1.0),
    (1e-12, 0, 0.9, 0.0),
    (1e12, 40, 0.5, 0.0),
    (1.0, 100_000, 0.9999, 1e-7),
)


@dataclass(frozen=True)
class Case:
    """Every way of `WAYS` for each of `count` rows."""

    name: str
    vocab: int
    spread: float = 3.0
    rounded: float = 0.0  # logits are multiples of it: many are equal
    count: int = 1
    poison: bool = False  # NaN, infinities, both zeros
    banned: int = 0  # tokens of each row
    weightless: bool = False  # rows of -inf, of NaN, and with +inf

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("few tokens", 7),
    Case("a prime", 211),
    Case("several tiles", 700),
    Case("flat", 300, spread=0.1),
    Case("peaked", 300, spread=12.0),
    Case("ties", 200, rounded=1.0),
    Case("all equal", 150, spread=0.0),
    Case("not finite", 150, rounded=0.5, poison=True, count=2),
    Case("banned", 90, banned=40),
    Case("nothing weighs anything", 67, count=3, weightless=True),
)


@dataclass(frozen=True)
class Problem:
    logits: torch.Tensor
    ways: np.ndarray
    keys: np.ndarray
    banned: list[tuple[int, int]]

    def draws(self, device: str = "cpu") -> kernels.Draws:
        return kernels.plan_draws(self.ways, self.keys, self.banned, torch.device(device))

    def expected(self) -> list[int]:
        logits = self.logits.clone().numpy()
        for row, token in self.banned:
            logits[row, token] = -np.inf
        scales = self.draws().rows.numpy()[:, SCALE].astype(np.int32).view(np.float32)
        bits = uniform_bits(self.keys[:, 0], self.keys[:, 1])
        return [
            expected_token(logits[row], self.ways[row], scales[row], int(bits[row])) for row in range(len(self.ways))
        ]


def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng(sum(case.name.encode()))
    rows = len(WAYS) * case.count
    logits = (rng.standard_normal((rows, case.vocab)) * case.spread).astype(np.float32)
    if case.rounded:
        logits = (np.round(logits / case.rounded) * case.rounded).astype(np.float32)
    if case.poison:
        logits[:, 5], logits[:, 11], logits[:, 12], logits[:, 13] = np.nan, -np.inf, -0.0, 0.0
        logits[len(WAYS) :] = -np.abs(logits[len(WAYS) :])  # the zeros are the largest
        logits[3], logits[4] = -np.inf, np.nan
    if case.weightless:
        logits[: len(WAYS)], logits[len(WAYS) : 2 * len(WAYS)] = -np.inf, np.nan
        logits[2 * len(WAYS) :, [9, 40]] = np.inf
    banned = [(row, int(token)) for row in range(rows) for token in rng.permutation(case.vocab)[: case.banned]]
    keys = np.stack((rng.integers(-(2**63), 2**63 - 1, rows), rng.integers(0, 2**33, rows)), axis=1)
    return Problem(torch.from_numpy(logits), np.array(WAYS * case.count), keys, banned)


def expected_token(logits: np.ndarray, way: np.ndarray, scale: np.float32, uniform: int) -> int:
    values = [float("-inf") if value != value else float(value) for value in logits]
    ranking = sorted(range(len(values)), key=lambda token: (-values[token], token))
    temperature, top_k, top_p, min_p = (float(number) for number in way)
    weight = [weight_of(np.float32(value), np.float32(values[ranking[0]]), scale) for value in values]
    if not temperature or not any(weight):
        return ranking[0]
    left = ranking[: int(top_k)] if top_k else ranking
    fraction = Fraction(int(min(top_p, 1.0) * 2.0**53), 2**53)
    limit = max(1, int(fraction * sum(weight[token] for token in left)))
    before, kept = 0, []
    for token in left:
        if before < limit:
            kept.append(token)
        before += weight[token]
    kept = sorted(token for token in kept if weight[token] >= Fraction(min_p) * 2**40)
    target = int(Fraction(uniform, 2**53) * sum(weight[token] for token in kept))
    running = 0
    for token in kept:
        running += weight[token]
        if running > target:
            return token
    raise AssertionError("a draw beyond the total")


def weight_of(value: np.float32, largest: np.float32, scale: np.float32) -> int:
    with np.errstate(invalid="ignore"):
        x = np.float32(np.float32(value - largest) * scale)
    x = x if x > -64 else np.float32(-64)
    whole = np.floor(x)
    part = np.float32(x - whole)
    power = np.float32(POLYNOMIAL[-1])
    for factor in POLYNOMIAL[-2::-1]:
        power = np.float32(np.float32(power * part) + np.float32(factor))
    return int(Fraction(float(power)) * Fraction(2) ** (int(whole) + 40))
