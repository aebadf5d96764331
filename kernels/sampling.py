"""Drawing tokens: the rule that every implementation of `sample` keeps to the last bit, and its twin in NumPy.

Knows logits and numbers. Invariant: a row's token depends on that row's logits, parameters, seed and position alone.

Everything that is summed or compared is a whole number, so no order of summing and no device changes a token:

    weight     of a token: floor(2^40 * 2^x), x = (logit - largest) * scale; 2^x by `POLYNOMIAL` in float32, each
               product and each sum rounded once
    ranking    by logit, the largest first, equal ones by token id
    filters    each over what the one before left: the `top_k` first tokens; the fewest first tokens that weigh
               floor(top_p * their total), and one at least; those that weigh `min_p` times as much as the first
    draw       the first token in order of id up to which the tokens left weigh more than floor(uniform * their total)

A logit that is NaN counts as -inf, 0.0 equals -0.0, and where no token weighs anything the first of the ranking is it.
Only an x nearer to 0 than 2^-126, which logits of a model do not give, may count as 0 on one device and not on another.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

WEIGHT_BITS = 40
MOST_TOKENS = 1 << 20  # whose weights can be summed
FRACTION_BITS = 53  # of top_p and of a uniform number
ALL = 1 << FRACTION_BITS
# 2^f for f in [0, 1) within 1e-7, exact at 0; numbers of float32.
_DIGITS = ("0x1p0", "0x1.62e4c8p-1", "0x1.ebd8ap-3", "0x1.c9444p-5", "0x1.269deep-7", "0x1.eca6fp-10")
POLYNOMIAL = tuple(map(float.fromhex, _DIGITS))
LEAST_POWER = -64.0  # of two: whatever is below weighs nothing
SCALES = (2.0**-60, 2.0**60)
_FLOAT32, _INT32 = struct.Struct("=f"), struct.Struct("=i")
_SEEDS, _HALF = (1 << 64) - 1, 1 << 63

COLUMNS = 6
SCALE, SEED, POSITION, TOP_K, TOP_P, MIN_P = range(COLUMNS)

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# A row is cut into so many parts, first few, then many: what is above the median of their maxima is looked at first.
_LANES = (256, 2048)
# A row's 2^x summed in floating point are several times nearer to its weights than one part in 2^18, of 2^20 tokens.
_NEAR_BITS = 18


@dataclass(frozen=True, slots=True)
class Draws:
    """How the token of each row is drawn, in whole numbers, where the logits are."""

    rows: torch.Tensor  # [n, 6] int64: bits of the float32 log2(e) / temperature or 0 where it is greedy, seed,
    # position, top_k (0 keeps all), top_p * 2^FRACTION_BITS, min_p * 2^WEIGHT_BITS
    banned: torch.Tensor  # [num_banned, 2] int64: row, token


@lru_cache(maxsize=1024)
def _fixed(temperature: float, top_k: float, top_p: float, min_p: float) -> tuple[int, int, int, int]:
    """What a row of `Draws` says of these."""
    scale = 0
    if temperature > 0:
        least, most = SCALES
        (scale,) = _INT32.unpack(_FLOAT32.pack(min(max(math.log2(math.e) / temperature, least), most)))
    kept, least_part = (min(max(float(part), 0.0), 1.0) for part in (top_p, min_p))
    return scale, int(top_k), int(kept * 2.0**FRACTION_BITS), math.ceil(least_part * 2.0**WEIGHT_BITS)


def plan_draws(
    ways: Iterable[Sequence[float]],
    keys: Iterable[Sequence[int]],
    banned: Sequence[tuple[int, int]],
    device: torch.device,
) -> Draws:
    """`ways[n, 4]`: temperature (0: the most likely token), top_k (0 keeps all), top_p and min_p of each row.
    `keys[n, 2]`: seed, of which the 64 lowest bits count, and absolute position of the token. `banned`: (row, token)
    that must not be drawn. Goes to `device` in one copy."""
    numbers: list[int] = []
    for way, (seed, position) in zip(ways, keys, strict=True):
        scale, *filters = _fixed(*way)
        numbers += (scale, (int(seed) + _HALF & _SEEDS) - _HALF, position, *filters)
    end = len(numbers)
    for pair in banned:
        numbers += pair
    flat = np.array(numbers, dtype=np.int64)
    if device.type == "cpu":
        parts = (flat[:end].reshape(-1, COLUMNS), flat[end:].reshape(-1, 2))
        return Draws(*map(torch.from_numpy, parts))
    there = torch.from_numpy(flat).to(device, non_blocking=True)
    return Draws(there[:end].view(-1, COLUMNS), there[end:].view(-1, 2))


def sample(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """As `kernels.sample`, computed on the CPU wherever the logits are."""
    values = logits.cpu().numpy()
    rows, banned = draws.rows.cpu().numpy(), draws.banned.cpu().numpy()
    if len(banned):
        values[banned[:, 0], banned[:, 1]] = -np.inf
    values, tokens, largest = _most_likely_token(values)
    filtered = (rows[:, TOP_K] > 0) | (rows[:, TOP_P] < ALL) | (rows[:, MIN_P] > 0)
    random = rows[:, SCALE] != 0
    for chosen, draw in ((random & ~filtered, _unfiltered), (random & filtered, _filtered)):
        index = np.flatnonzero(chosen)
        if len(index):
            every = len(index) == len(rows)
            drawn = draw(values if every else values[index], largest[index], rows[index])
            tokens[index] = np.where(drawn < 0, tokens[index], drawn)
    return torch.from_numpy(tokens).to(logits.device)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """As `kernels.argmax`, computed on the CPU wherever the logits are."""
    return torch.from_numpy(_most_likely_token(logits.cpu().numpy())[1]).to(logits.device)


def _most_likely_token(values: Floats) -> tuple[Floats, Ints, Floats]:
    """`values[n, m]` with -inf for NaN, and of each row the token and its logit."""
    tokens = values.argmax(1)
    largest = values[np.arange(len(tokens)), tokens]
    if np.isnan(largest).any():
        return _most_likely_token(np.where(np.isnan(values), np.float32(-np.inf), values))
    return values, tokens, largest


def philox(counter: Ints, key: Ints) -> Ints:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    `counter[n, 4]` and `key[n, 2]` are int64 that hold 32-bit words; returns `[n, 4]` of the same kind.
    """
    multipliers = np.array(_MULTIPLIERS, dtype=np.uint64)[:, None]
    steps = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * np.array(_WEYL, dtype=np.uint64)[:, None]
    keys = (key.T.astype(np.uint64) + steps) & np.uint64(_WORD)  # [rounds, 2, n]
    even, odd = (counter.T[first::2].astype(np.uint64) for first in (0, 1))
    for turn in keys:
        product = even * multipliers
        even, odd = (product >> np.uint64(32))[::-1] ^ odd ^ turn, (product & np.uint64(_WORD))[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]), axis=1).view(np.int64)


def uniform_bits(seeds: Ints, positions: Ints) -> Ints:
    """A uniform number below 2^FRACTION_BITS for each pair of `seeds[n]` (all 64 bits used) and `positions[n]` >= 0."""
    zeros = np.zeros_like(positions)
    counter = np.stack((positions & _WORD, positions >> 32, zeros, zeros), axis=1)
    words = philox(counter, np.stack((seeds & _WORD, (seeds >> 32) & _WORD), axis=1))
    return (words[:, 0] << 21) | (words[:, 1] >> 11)


def portion(fraction: Ints, total: Ints) -> Ints:
    """floor(`fraction` * `total` / 2^FRACTION_BITS), of a fraction up to 2^FRACTION_BITS and a total up to 2^60."""
    low = (1 << 27) - 1
    a, b, c, d = fraction >> 27, fraction & low, total >> 27, total & low
    found: Ints = 2 * a * c + ((a * d + b * c + (b * d >> 27)) >> 26)
    return found


def weights(values: Floats, largest: Floats, scale: Floats) -> Ints:
    """Of `values[n, m]`, with `largest[n]` and `scale[n]` of each row."""
    # Torch's operations on arrays in place take a third of NumPy's time, and round in the same way.
    x = (torch.from_numpy(values) - torch.from_numpy(largest)[:, None]).mul_(torch.from_numpy(scale)[:, None])
    torch.fmax(x, torch.tensor(LEAST_POWER), out=x)  # infinite less infinite, which is no number, weighs nothing too
    whole = x.floor()
    x.sub_(whole)
    power = x * POLYNOMIAL[-1]
    for factor in POLYNOMIAL[-2:0:-1]:
        power.add_(factor).mul_(x)
    power.add_(POLYNOMIAL[0])
    power.view(torch.int32).add_(whole.add_(WEIGHT_BITS).to(torch.int32), alpha=1 << 23)
    return power.to(torch.int64).numpy()


def _unfiltered(values: Floats, largest: Floats, rows: Ints) -> Ints:
    return _located(weights(values, largest, _scales(rows)), rows)


def _located(kept: Ints, rows: Ints) -> Ints:
    """The column of `kept[n, m]` weights that each row draws, -1 where there is none."""
    running = torch.from_numpy(kept).cumsum(1).numpy()
    target = portion(uniform_bits(rows[:, SEED], rows[:, POSITION]), running[:, -1])
    found = np.array([np.searchsorted(*pair, side="right") for pair in zip(running, target, strict=True)])
    return np.where(found < kept.shape[1], found, -1)


def _filtered(values: Floats, largest: Floats, rows: Ints) -> Ints:
    """Looks at the first tokens of the ranking alone, and where the filters leave more, at more of them."""
    totals = np.zeros(len(rows), dtype=np.int64)
    whole = np.flatnonzero((rows[:, TOP_K] == 0) & (rows[:, TOP_P] < ALL))
    if len(whole):
        totals[whole] = _nearly_all(values if len(whole) == len(rows) else values[whole], largest[whole], rows[whole])
    drawn, left = np.zeros(len(rows), dtype=np.int64), np.arange(len(rows))
    for lanes in _LANES:
        if len(left) and 2 * lanes <= values.shape[1]:
            ids, likely = _most_likely(values if len(left) == len(rows) else values[left], lanes)
            drawn[left], enough = _drawn(likely, ids, largest[left], rows[left], totals[left])
            left = left[~enough]
    if len(left):
        every = np.arange(values.shape[1])[None, :].repeat(len(left), 0)
        drawn[left], _ = _drawn(values[left], every, largest[left], rows[left], None)
    return drawn


def _nearly_all(values: Floats, largest: Floats, rows: Ints) -> Ints:
    """The weights of each row, but for one part in 2^_NEAR_BITS: a fraction of the time that the exact sum takes."""
    x = (torch.from_numpy(values) - torch.from_numpy(largest)[:, None]).mul_(torch.from_numpy(_scales(rows))[:, None])
    total = x.exp2_().sum(1, dtype=torch.float64).nan_to_num_(0.0)
    about: Ints = (total * 2.0**WEIGHT_BITS).to(torch.int64).numpy()
    return about


def _most_likely(values: Floats, num_lanes: int) -> tuple[Ints, Floats]:
    """Ids, in order, and values of all that are at least some value of each row: both `[n, most of a row]`, filled up
    with -inf. The value is the median of the largest of `num_lanes` parts of a row."""
    count, size = values.shape
    lanes = torch.from_numpy(values[:, : size // num_lanes * num_lanes]).view(count, -1, num_lanes).amax(1).numpy()
    guide = np.partition(lanes, num_lanes // 2, axis=1)[:, num_lanes // 2, None]
    row, token = np.divmod(np.flatnonzero(values >= guide), size)
    each = np.bincount(row, minlength=count)
    place = np.arange(len(row)) - np.repeat(np.cumsum(each) - each, each)
    ids = np.zeros((count, int(each.max(initial=1))), dtype=np.int64)
    likely = np.full(ids.shape, -np.inf, dtype=np.float32)
    ids[row, place] = token
    likely[row, place] = values[row, token]
    return ids, likely


def _drawn(
    values: Floats, ids: Ints, largest: Floats, rows: Ints, totals: Ints | None
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """A token of each row of `values[n, m]`, whose `ids` are in order, -1 where nothing weighs; and whether it is sure
    that the filters leave none but these. `totals` are those of `_nearly_all`, None where `values` are whole rows."""
    size, every = values.shape[1], np.arange(len(rows))
    ranked = -np.sort(-values, axis=1)
    ranked_weights = weights(ranked, largest, _scales(rows))
    running = np.cumsum(ranked_weights, axis=1)
    by_count = rows[:, TOP_K] > 0
    top_k = np.where(by_count, np.minimum(rows[:, TOP_K], size), size)
    total, near = running[every, top_k - 1], np.zeros_like(top_k)
    if totals is not None:
        total, near = np.where(by_count, total, totals), np.where(by_count, 0, (totals >> _NEAR_BITS) + 1)
    fewest, most = (
        np.where(rows[:, TOP_P] < ALL, np.maximum(portion(rows[:, TOP_P], about), 1), np.iinfo(np.int64).max)
        for about in (total - near, total + near)
    )
    before = running - ranked_weights
    kept = np.minimum((before < fewest[:, None]).sum(1), top_k)
    same = kept == np.minimum((before < most[:, None]).sum(1), top_k)
    drawn = _kept_drawn(values, ids, largest, rows, (ranked[every, kept - 1], kept))
    least, count = rows[:, MIN_P], np.isfinite(values).sum(1)
    # Weights follow the ranking but for rounding.
    past = ranked_weights[every, np.maximum(count - 1, 0)] < least - (least >> 10)
    return drawn, np.where(by_count, rows[:, TOP_K] <= count, same & ((running[:, -1] >= most) | past))


def _kept_drawn(values: Floats, ids: Ints, largest: Floats, rows: Ints, last_kept: tuple[Floats, Ints]) -> Ints:
    """A token of the first of each row's ranking, as min_p leaves them: `last_kept` is the last value, and how many."""
    last, kept = last_kept
    equal, above = values == last[:, None], values > last[:, None]
    equal &= np.cumsum(equal, axis=1) <= (kept - above.sum(1))[:, None]
    weight = weights(values, largest, _scales(rows))
    weight *= (above | equal) & (weight >= rows[:, MIN_P, None])
    found = _located(weight, rows)
    return np.where(found < 0, -1, ids[np.arange(len(rows)), found])


def _scales(rows: Ints) -> Floats:
    return rows[:, SCALE].astype(np.int32).view(np.float32)
