"""The planted prefix: found where both ends make equal keys, counted and named where they do not."""

from __future__ import annotations

import logging

import pytest

from kvstore.block import WorkerId
from kvstore.events import BlocksStored
from kvstore.lease import Lease
from kvstore.memory_index import MemoryIndex
from kvstore.planted import planted_keys
from router.self_check import SelfCheck

W = WorkerId("w")
MODEL = b"m" * 16


def lease(epoch: int = 1, model: bytes = MODEL) -> Lease:
    return Lease(
        worker_id=W, epoch=epoch, address="", model="m", block_size=16, key_fingerprint="", pid=1, device_blocks=9,
        model_fingerprint=model.hex(), max_model_len=9, vocab_size=9,
    )  # fmt: skip


def test_it_is_found_with_the_routers_own_keys() -> None:
    index = MemoryIndex()
    check = SelfCheck(index, 16)
    index.apply(W, 1, [BlocksStored(list(planted_keys(MODEL, 16)))])
    check(W, lease())
    assert check.num_unfound == 0


@pytest.mark.parametrize("planted", [planted_keys(MODEL, 32), planted_keys(b"x" * 16, 16), planted_keys(MODEL, 16)[:1]])
def test_another_block_size_model_or_a_part_of_it_is_named_once_a_life(
    planted: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    index = MemoryIndex()
    check = SelfCheck(index, 16)
    index.apply(W, 1, [BlocksStored(list(planted))])
    with caplog.at_level(logging.ERROR):
        check(W, lease())
        check(W, lease())
        assert (check.num_unfound, len(caplog.records)) == (1, 1)
        check(W, lease(epoch=2))
        assert (check.num_unfound, len(caplog.records)) == (1, 2)
    index.apply(W, 2, [BlocksStored(list(planted_keys(MODEL, 16)))])
    check(W, lease(epoch=2))
    assert check.num_unfound == 0
