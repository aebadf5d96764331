"""Records of published prefixes as Redis holds them: encrypted and authenticated with a key of the cluster's secret.

Knows no Redis. Invariant: without the secret nobody reads a record, changes one, or moves one to another id or cluster.
"""

from __future__ import annotations

import hashlib
import secrets

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvstore.scope import frame
from router.prefix_catalog import PrefixRecord
from router.sorted_prefixes import TOKEN_BYTES

_NONCE_BYTES = 12


class PrefixSeal:
    """Seals and opens records of one cluster."""

    def __init__(self, secret: bytes, cluster: str) -> None:
        key = hashlib.blake2b(
            frame("prefix records", cluster), key=hashlib.sha256(secret).digest(), digest_size=32, person=b"pando.seal"
        )
        self._cipher = AESGCM(key.digest())
        self._cluster = cluster

    def seal(self, record: PrefixRecord) -> bytes:
        """The bytes to store under the record's id."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, msgspec.msgpack.encode(record), self._bound_to(record.id))

    def open(self, prefix_id: str, sealed: bytes) -> PrefixRecord | None:
        """The record that was sealed for this id; None for anything else."""
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            plain = self._cipher.decrypt(nonce, rest, self._bound_to(prefix_id))
            record = msgspec.msgpack.decode(plain, type=PrefixRecord)
        except (InvalidTag, ValueError, msgspec.MsgspecError):
            return None
        whole = record.tokens and len(record.tokens) % TOKEN_BYTES == 0
        return record if whole and record.id == prefix_id else None

    def _bound_to(self, prefix_id: str) -> bytes:
        return frame("prefix record", self._cluster, prefix_id)
