"""What other routers place at the moment of a decision: how much is measured, and where it is expected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.unheard import Others, Unheard, expected


def tokens_of(unheard: Unheard) -> float:
    return 0.0 if unheard.others is None else unheard.others.tokens


def test_what_is_heard_second_after_a_decision_was_unheard_then() -> None:
    unheard = Unheard()
    for tokens in (9000, 70, 9000):
        unheard.hear(tokens)
    assert unheard.others is None
    unheard.decide()
    for tokens in (9000, 400, 9000):
        unheard.hear(tokens)
    assert unheard.others == Others(400.0, 0, 1)


def test_each_decision_counts_and_what_is_over_fades() -> None:
    unheard = Unheard()
    for tokens in (600, 0, 300):
        unheard.decide()
        unheard.decide()
        unheard.hear(1)
        unheard.hear(tokens)
    assert tokens_of(unheard) == pytest.approx(300.0)
    for _ in range(200):
        unheard.decide()
        unheard.hear(0)
    assert unheard.others is None


def test_who_is_alone_more_often_than_not_expects_nobody() -> None:
    unheard = Unheard()
    for number in range(300):
        unheard.decide()
        unheard.hear(0)
        unheard.hear(5000 * (number % 3 == 0))
        assert number == 0 or unheard.others is None


workers = st.lists(st.tuples(st.floats(0, 60), st.floats(1e-5, 1e-2), st.booleans()), min_size=1, max_size=20)


@given(workers, st.floats(1, 1e6))
def test_all_that_get_some_of_it_are_done_alike_and_before_the_others_begin(
    rows: list[tuple[float, float, bool]], tokens: float
) -> None:
    ready_s = np.array([np.inf if out and at else ready for at, (ready, _, out) in enumerate(rows)])
    s_per_token = np.array([seconds for _, seconds, _ in rows])
    found = expected(ready_s, s_per_token, tokens)
    assert (found >= 0).all() and found.sum() == pytest.approx(tokens, rel=1e-3)
    some = found > 0
    ends = (ready_s + found * s_per_token)[some]
    assert ends == pytest.approx(np.full(len(ends), ends[0]))
    assert (ready_s[~some] >= ends[0] - 1e-6).all()


def test_routers_find_their_places_by_name() -> None:
    unheard = Unheard()
    unheard.decide()
    unheard.hear(0)
    unheard.hear(10)
    unheard.stand(["r-9", "r-1", "r-5"], "r-5")
    assert unheard.others == Others(10.0, 1, 3)
    unheard.stand(["r-9"], "r-5")
    assert unheard.others == Others(10.0, 0, 2)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any), st.integers(1, 40))
def test_the_parts_of_all_routers_are_what_the_weights_say(weights: list[int], routers: int) -> None:
    """A row is in no more parts than its weight touches; where parts are as large as rows, in one."""
    parts = [Others(1.0, rank, routers).part(np.array(weights, float)) for rank in range(routers)]
    share = sum(weights) / routers
    for row, weight in enumerate(weights):
        taken = sum(bool(part[row]) for part in parts)
        assert int(weight / share + 1e-9) - 1 <= taken <= weight / share + 2
        assert weight or not taken
    even = [Others(1.0, rank, routers).part(np.ones(routers)) for rank in range(routers)]
    assert np.array_equal(np.array(even), np.eye(routers, dtype=bool))
