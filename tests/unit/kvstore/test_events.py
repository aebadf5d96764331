"""Events on the wire."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.events import (
    CPU,
    BlocksRemoved,
    BlocksStored,
    Cleared,
    EventBatch,
    TierChanged,
    decode,
    encode,
    num_keys,
)

KEY = bytes(range(16))
BATCH = EventBatch("w", 3, 7, [BlocksStored([KEY, KEY]), BlocksRemoved([KEY], CPU), TierChanged([KEY], CPU), Cleared()])


def test_round_trip() -> None:
    assert decode(encode(BATCH)) == BATCH
    assert num_keys(BATCH.events) == 4


def test_small_on_the_wire() -> None:
    empty = len(encode(EventBatch("w", 3, 7, [BlocksStored([])])))
    assert len(encode(EventBatch("w", 3, 7, [BlocksStored([KEY] * 100)]))) - empty <= 100 * 18 + 4


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encode(BATCH)[:-1],
        msgspec.msgpack.encode(["w", 1, 1, [["X", [KEY]]]]),
        msgspec.msgpack.encode(["w", 1, 1, [["S", "no list", 0]]]),
        msgspec.msgpack.encode(["w", 1, 1, [["S", ["text"], 0]]]),
        msgspec.msgpack.encode({"worker": "w"}),
    ],
)
def test_anything_else_is_refused(payload: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(payload)
