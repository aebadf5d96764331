"""What changed in a worker's resident blocks, and its form on the wire (msgpack arrays).

Knows keys and tiers only. Invariant: applying a batch twice gives the same state as applying it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import msgspec

KEY_BYTES = 16
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
    digest: int = 0
    """`state_digest` of all that is resident after the batch."""


def encode(batch: EventBatch) -> bytes:
    """The batch as msgpack."""
    return msgspec.msgpack.encode(batch)


def decode(payload: bytes) -> EventBatch:
    """The batch in `payload`; raises `msgspec.DecodeError` or `msgspec.ValidationError` on anything else."""
    return _DECODER.decode(payload)


def num_keys(events: Sequence[Event]) -> int:
    """How many keys the events name."""
    return sum(0 if isinstance(event, Cleared) else len(event.keys) for event in events)


def keys_sum(keys: Iterable[bytes]) -> int:
    """Sum of the 64-bit halves of 16-byte keys: the same in any order, and what was added can be subtracted.

    Keys are keyed digests already, so nothing is hashed again. Modulo 2^64 - 1, because there a number is congruent to
    the sum of its 64-bit digits: one division adds them all.
    """
    return int.from_bytes(b"".join(keys), "little") % _MODULUS


def state_digest(device_sum: int, cpu_sum: int) -> int:
    """64 bits that differ when what a worker holds, in either tier, differs; from the `keys_sum` of each tier."""
    return (device_sum + cpu_sum * _CPU_FACTOR) % _MODULUS


_MODULUS = 2**64 - 1
_CPU_FACTOR = 0x9E3779B97F4A7C16  # has an inverse modulo 2^64 - 1, so that no bit of the sum is lost
_DECODER = msgspec.msgpack.Decoder(EventBatch)
