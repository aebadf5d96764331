"""Which token each row gets: parameters mixed in one batch, bans, seeds and positions."""

from __future__ import annotations

import torch

from worker.batch import SamplingParams
from worker.sampler import Draw, start

VOCAB = 211


def choose(rows: torch.Tensor, draws: list[Draw]) -> list[int]:
    return start(rows, draws).tolist()


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    rows = logits(3)
    rows[1, [7, 9]] = 50.0
    assert choose(rows, [Draw(SamplingParams(), 5)] * 3) == [rows[0].argmax(), 7, rows[2].argmax()]


def test_greedy_alone_and_beside_another() -> None:
    rows = logits(5)
    rows[2, 4], rows[3] = torch.nan, -torch.inf
    greedy = [Draw(SamplingParams(), 5)] * 4
    other = Draw(SamplingParams(temperature=1.0), 5)
    assert choose(rows[:4], greedy) == choose(rows, [*greedy, other])[:4]


def test_banned_tokens_are_not_chosen() -> None:
    rows = logits(2)
    order = rows[0].argsort(descending=True).tolist()
    banned = Draw(SamplingParams(), 0, tuple(order[:3]))
    assert choose(rows.clone(), [banned, Draw(SamplingParams(), 0)]) == [order[3], rows[1].argmax()]
    everything_but_5 = tuple(token for token in range(VOCAB) if token != 5)
    draws = [Draw(SamplingParams(temperature=1.0, seed=seed), 3, everything_but_5) for seed in range(2)]
    assert choose(rows.clone(), draws) == [5, 5]


def mixed_draws() -> list[Draw]:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.2, top_k=20, seed=2**64 - 1),
        SamplingParams(temperature=0.7, top_p=0.8, seed=12345),
        SamplingParams(temperature=1.0, min_p=0.05, top_k=100, seed=2**63),
    ]
    return [Draw(kinds[row % 5], position=row * 37, banned_token_ids=(row,) if row % 3 else ()) for row in range(40)]


def test_the_same_alone_and_in_any_batch() -> None:
    rows, draws = logits(40), mixed_draws()
    together = choose(rows.clone(), draws)
    alone = [choose(rows[row : row + 1].clone(), [draws[row]])[0] for row in range(40)]
    assert alone == together
    reverse = choose(rows.flip(0), draws[::-1])
    assert reverse[::-1] == together


def test_seed_and_position_decide() -> None:
    row = torch.zeros(1, VOCAB)

    def token(seed: int, position: int) -> int:
        return choose(row.clone(), [Draw(SamplingParams(temperature=1.0, seed=seed), position)])[0]

    assert token(1, 1) == token(1, 1)
    assert len({token(1, position) for position in range(20)}) > 10
    assert len({token(seed, 1) for seed in range(20)}) > 10


def test_low_temperature_is_nearly_greedy() -> None:
    rows = logits(20)
    draws = [Draw(SamplingParams(temperature=0.001, seed=seed), 0) for seed in range(20)]
    assert choose(rows.clone(), draws) == rows.argmax(-1).tolist()
