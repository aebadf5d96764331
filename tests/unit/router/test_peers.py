"""What other routers sent, added up by worker and found by a prompt's head."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import BlockKey, WorkerId
from router.peers import PeerLoads, SentLoad, marks

W1, W2 = WorkerId("w1"), WorkerId("w2")


def chain(length: int, seed: int = 0) -> list[BlockKey]:
    return [BlockKey(bytes([seed]) + n.to_bytes(15, "big")[::-1]) for n in range(length)]


def test_loads_add_up_by_worker_and_life() -> None:
    peers = PeerLoads()
    assert (peers.at(W1, 1).queued_tokens, peers.at(W1, 1).in_flight) == (0, 0)
    peers.take([{"w1": SentLoad(1, 100, 2), "w2": SentLoad(4, 7, 1)}, {"w1": SentLoad(1, 50, 3)}])
    assert (peers.at(W1, 1).queued_tokens, peers.at(W1, 1).in_flight) == (150, 5)
    assert (peers.at(W2, 4).queued_tokens, peers.at(W2, 3).queued_tokens) == (7, 0)
    peers.take([])
    assert peers.at(W1, 1).in_flight == 0


def test_a_worker_is_found_by_the_head_that_another_router_sent_it() -> None:
    peers = PeerLoads()
    head, tail, other = chain(40), chain(40, seed=9), chain(40, seed=3)
    peers.take([{"w1": SentLoad(1, 1, 1, marks([*head, *tail], 0)), "w2": SentLoad(2, 1, 1, marks(head[:8], 0))}])
    assert peers.computing(head) == {(W1, 1): 40, (W2, 2): 8}
    assert peers.computing(other) == {}
    assert peers.computing([]) == {}


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 3000))
def test_at_most_an_eighth_of_a_common_head_is_missed(common: int, rest: int, start: int) -> None:
    head = chain(common)
    sent, asked = [*head, *chain(rest, seed=1)], [*head, *chain(rest, seed=2)]
    peers = PeerLoads()
    peers.take([{"w1": SentLoad(1, 1, 1, marks(sent, min(start, common - 1)))}])
    depth = peers.computing(asked).get((W1, 1), 0)
    assert depth <= common
    assert depth >= common * 7 / 8 or (depth == 0 and min(start, common - 1) >= common * 7 / 8)


def test_marks_of_a_long_prompt_are_few() -> None:
    assert len(marks(chain(8192), 0)) <= 8 * 100
    assert marks(chain(8192), 8192) == b""
