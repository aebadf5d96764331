"""What changed in a worker's resident blocks, and its form on the wire (msgpack arrays).

Knows keys and tiers only. Invariant: applying a batch twice gives the same state as applying it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

DEVICE = 0
CPU = 1


class BlocksStored(msgspec.Struct, frozen=True, array_like=True, tag="S"):
    """These blocks are now resident in `tier`."""

    keys: list[bytes]
    tier: int = DEVICE


class BlocksRemoved(msgspec.Struct, frozen=True, array_like=True, tag="R"):
    """These blocks left `tier`."""

    keys: list[bytes]
    tier: int = DEVICE


class TierChanged(msgspec.Struct, frozen=True, array_like=True, tag="T"):
    """These blocks left every other tier and are now in `tier`."""

    keys: list[bytes]
    tier: int


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="C"):
    """No block is resident in any tier."""


Event: TypeAlias = BlocksStored | BlocksRemoved | TierChanged | Cleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """All changes of one engine step. `seq` grows by one with each batch of an epoch."""

    worker: str
    epoch: int
    seq: int
    events: list[Event]


def encode(batch: EventBatch) -> bytes:
    """The batch as msgpack."""
    return msgspec.msgpack.encode(batch)


def decode(payload: bytes) -> EventBatch:
    """The batch in `payload`; raises `msgspec.DecodeError` or `msgspec.ValidationError` on anything else."""
    return _DECODER.decode(payload)


def num_keys(events: Sequence[Event]) -> int:
    """How many keys the events name."""
    return sum(0 if isinstance(event, Cleared) else len(event.keys) for event in events)


_DECODER = msgspec.msgpack.Decoder(EventBatch)
