"""What eviction is likely to cost, from the keys that passed."""

from __future__ import annotations

from kvstore.block import BlockKey, WorkerId
from router.ghost import MOST_KEYS, Ghost

A, B = WorkerId("a"), WorkerId("b")


def keys(name: int, count: int = 16) -> list[BlockKey]:
    """All of the sample."""
    return [BlockKey(b"\0" + name.to_bytes(4, "big") + block.to_bytes(4, "big")) for block in range(count)]


def ghost(**blocks: int) -> Ghost:
    made = Ghost()
    for worker, count in blocks.items():
        made.resize(WorkerId(worker), count)
    return made


def test_a_worker_with_room_evicts_nothing() -> None:
    made = ghost(a=1024)
    assert made.reuse(A, 0.0) == 0.0
    made.placed(A, keys(1), 0.0)
    assert made.reuse(A, 1.0) == 0.0
    assert made.reuse(WorkerId("unknown"), 1.0) == 0.0


def test_sessions_that_go_on_are_worth_more_than_prompts_that_never_come_again() -> None:
    made = ghost(a=1024, b=1024)  # 128 keys of each in the sample: eight prompts
    for turn in range(40):
        for session in range(8):
            made.placed(A, keys(session), turn + session / 10)
            made.placed(B, keys(1000 + 8 * turn + session), turn + session / 10)
    assert made.reuse(A, 40.0) > 0.25
    # What is idle for longer than any reuse took is worth nothing.
    assert made.reuse(B, 140.0) == 0.0


def test_the_oldest_counts_even_where_much_is_fresh() -> None:
    made = ghost(a=1024)
    for prompt in range(8):
        made.placed(A, keys(prompt), 0.0)
    for turn in range(60):
        made.placed(A, keys(7), float(turn))
    assert made.reuse(A, 60.0) == 0.0
    for prompt in range(7):
        made.placed(A, keys(prompt), 60.0)
    assert made.reuse(A, 60.5) > 0.3


def test_it_stays_bounded_and_forgets_workers() -> None:
    made = ghost(a=1024)
    for prompt in range(MOST_KEYS // 8):
        made.placed(A, keys(prompt), float(prompt))
    assert len(made._last) == MOST_KEYS
    assert len(made._orders[A]) == 128
    made.drop(A)
    assert made.reuse(A, 0.0) == 0.0
    made.placed(A, keys(1), 0.0)
