"""Token ids to text while they arrive: whole characters only, and nothing past a stop string.

Knows bytes, characters and strings, nothing of models or requests. Invariant: the pieces given out, joined, do not
depend on how the tokens were cut into deltas, and the work is linear in the tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pando.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # what SentencePiece vocabularies write for a space


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The UTF-8 bytes of every token id: b"" for special tokens and for ids that are no token.

    `leading_space` is whether the decoder of this vocabulary drops one space at the start of a whole text.
    """

    pieces: tuple[bytes, ...]
    leading_space: bool

    def __getitem__(self, token_id: int) -> bytes:
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else b""


def token_bytes(vocabulary: dict[str, int], added: dict[int, tuple[str, bool]], decoder: Any) -> TokenBytes:
    """The bytes of each token, from the vocabulary, the added tokens (id -> text, is special) and the decoder's JSON.

    Raises `ConfigError` for a decoder that is neither byte-level nor of the SentencePiece kind.
    """
    kinds = _decoder_kinds(decoder)
    if "ByteLevel" in kinds:
        to_bytes = _byte_level_bytes
    elif kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        to_bytes = _sentencepiece_bytes
    else:
        raise ConfigError(f"tokenizer.json has a decoder that is not supported: {', '.join(sorted(kinds)) or 'none'}")
    pieces = [b""] * (1 + max((*vocabulary.values(), *added), default=-1))
    for token, token_id in vocabulary.items():
        pieces[token_id] = to_bytes(token)
    for token_id, (text, special) in added.items():
        pieces[token_id] = b"" if special else text.encode("utf-8", "replace")
    return TokenBytes(tuple(pieces), leading_space=bool(kinds & {"Strip", "Metaspace"}))


class Detokenizer:
    """One answer's text, token by token."""

    def __init__(self, tokens: TokenBytes, *, continues: bool = True) -> None:
        """`continues`: the text goes on after a prompt, so a leading space is part of it."""
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokens.leading_space and not continues

    def feed(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete."""
        return self._cut(self._decoder.decode(b"".join([self._tokens[token] for token in token_ids])))

    def flush(self) -> str:
        """What is left at the end: a replacement character if a character stayed incomplete."""
        return self._cut(self._decoder.decode(b"", final=True))

    def _cut(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


@dataclass(frozen=True, slots=True)
class Released:
    """Text that may go out; `matched` is the stop string that ended it, None while there is none."""

    text: str
    matched: str | None = None


class StopStrings:
    """Finds the first of several stop strings in a text that arrives in pieces.

    The first is the one that is complete first; of two complete at the same character, the longer. Text that may be
    the beginning of a stop string is held back until it is not.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._prefixes = frozenset(stop[:size] for stop in stops for size in range(1, len(stop)))
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def feed(self, piece: str) -> Released:
        """Take the next piece; give what no longer can be part of a stop string."""
        if not self._stops:
            return Released(piece)
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, stop = min(ends)
            self._held = ""
            return Released(text[:at], stop)
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return Released(text[: len(text) - keep])

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if text[len(text) - size :] in self._prefixes:
                return size
        return 0


def _decoder_kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    if decoder.get("type") == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder.get("decoders", [])))
    return {str(decoder.get("type"))}


def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level vocabularies write the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8", "replace")


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte:
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE_MARK, " ").encode("utf-8", "replace")
