"""Drawing tokens: a counter-based uniform number for each row, and the inverse of the filtered distribution.

Knows logits and numbers. Invariant: a row's draw depends on that row's logits, parameters, seed and position alone.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    `counter[n, 4]` and `key[n, 2]` are int64 that hold 32-bit words; returns `[n, 4]` of the same kind.
    """
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key.unbind(1)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=1)


def counter_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One float64 in [0, 1) for each pair of `seeds[n]` (int64, all 64 bits used) and `positions[n]` (int64, >= 0)."""
    zeros = torch.zeros_like(positions)
    counter = torch.stack((positions & _WORD, positions >> 32, zeros, zeros), dim=1)
    key = torch.stack((seeds & _WORD, (seeds >> 32) & _WORD), dim=1)
    words = philox(counter, key)
    return ((words[:, 0] << 21) | (words[:, 1] >> 11)).double() * 2.0**-53


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token id (int64) for each row of `logits[n, vocab]` by the inverse distribution function at `uniform[n]`.

    Logits are divided by `temperature[n]` > 0. Then the filters, each over what the one before left: `top_k[n]` (int64,
    0 keeps all) most likely tokens; the fewest most likely tokens that hold `top_p[n]` of the probability; tokens at
    least `min_p[n]` times as likely as the first. One token is always left. Filtered rows are drawn in order of
    probability, equal ones by token id; without filters (all None) in order of token id, which saves the sort.
    """
    scaled = logits.double() / temperature[:, None]
    if top_k is None or top_p is None or min_p is None:
        return _inverse(torch.softmax(scaled, dim=-1), uniform)
    scaled, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)[None, :]
    keep = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    weights = torch.softmax(scaled.masked_fill(~keep, -torch.inf), dim=-1)
    before = torch.cumsum(weights, dim=-1) - weights
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep &= weights >= min_p[:, None] * weights[:, :1]
    keep[:, 0] = True
    drawn = _inverse(weights.masked_fill_(~keep, 0), uniform)
    return order.gather(1, drawn[:, None])[:, 0]


def _inverse(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first index of each row whose running sum exceeds `uniform` of the row's total."""
    running = torch.cumsum(weights, dim=-1)
    # uniform < 1, but the product may round up to the total: the last positive weight is the answer then.
    target = (uniform * running[:, -1]).minimum(running[:, -1] * (1 - 2.0**-52))
    return torch.searchsorted(running, target[:, None], right=True)[:, 0].clamp_(max=weights.shape[1] - 1)


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of 32-bit words; int64 wraps, its bits are those of the true product."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD
