"""What a worker computes, as far as a router may count on it."""

from __future__ import annotations

import pytest

from kvstore.block import BlockKey, WorkerId
from router.computing import Computing, Heads

KEYS = [BlockKey(bytes([n]) * 16) for n in range(6)]


@pytest.mark.parametrize("given", range(7))
def test_a_prompt_may_have_fewer_keys_than_blocks(given: int) -> None:
    computing = Computing(WorkerId("w"), Heads())
    computing.begin(KEYS, 0)
    assert [computing.depth(KEYS[:given], there, 6) for there in range(7)] == [max(there, given) for there in range(7)]
