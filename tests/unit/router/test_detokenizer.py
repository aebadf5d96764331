"""Text from tokens: whole characters, the same text however tokens are cut, stop strings across every border."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pando.errors import ConfigError
from router.detokenizer import Detokenizer, StopStrings, TokenBytes, token_bytes
from router.text_answer import TextAnswer

BYTES = TokenBytes(tuple(bytes([value]) for value in range(256)), leading_space=False)
"""A vocabulary whose tokens are the bytes: every character can be cut anywhere."""


def cuts(ids: Sequence[int], rng: random.Random) -> list[Sequence[int]]:
    pieces, at = [], 0
    while at < len(ids):
        size = rng.randint(1, 4)
        pieces.append(ids[at : at + size])
        at += size
    return pieces


@given(st.text(), st.integers(0, 9))
def test_text_survives_any_cutting(text: str, seed: int) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.feed(piece) for piece in cuts(text.encode(), random.Random(seed))]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


@given(st.binary(max_size=60), st.integers(0, 9))
def test_bytes_that_are_no_text_give_the_same_text_in_any_cutting(raw: bytes, seed: int) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.feed(piece) for piece in cuts(raw, random.Random(seed))]
    assert "".join(pieces) + detokenizer.flush() == raw.decode("utf-8", "replace")


def test_an_incomplete_character_is_held_back_and_replaced_at_the_end() -> None:
    detokenizer = Detokenizer(BYTES)
    emoji = "\U0001f600".encode()
    assert [detokenizer.feed([byte]) for byte in emoji] == ["", "", "", "\U0001f600"]
    assert detokenizer.feed(emoji[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    assert Detokenizer(BYTES).feed([65, 256, 2**31, 66]) == "AB"


def test_time_is_linear_in_tokens_that_never_make_a_character() -> None:
    detokenizer = Detokenizer(BYTES)
    began = time.perf_counter()
    for _ in range(100_000):
        detokenizer.feed([0x80])
    assert time.perf_counter() - began < 2.0


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("a", b"a"),
        ("\u0120x", b" x"),
        ("\u010a", b"\n"),
        ("\u00c3\u00a9", "\u00e9".encode()),
        ("\u65e5", "\u65e5".encode()),
    ],
)
def test_byte_level_tokens(token: str, expected: bytes) -> None:
    assert token_bytes({token: 0}, {}, {"type": "ByteLevel"})[0] == expected


SENTENCEPIECE = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def test_sentencepiece_tokens_and_the_leading_space() -> None:
    vocabulary = {"\u2581a": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "<s>": 4}
    tokens = token_bytes(vocabulary, {4: ("<s>", True)}, SENTENCEPIECE)
    assert Detokenizer(tokens).feed([4, 0, 1, 2, 3, 0]) == " a\u20ac a"
    assert Detokenizer(tokens, continues=False).feed([4, 0, 0]) == "a a"


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokens = token_bytes({"a": 0}, {1: ("<think>", False), 2: ("<|end|>", True)}, {"type": "ByteLevel"})
    assert Detokenizer(tokens).feed([1, 0, 2]) == "<think>a"


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="WordPiece"):
        token_bytes({"a": 0}, {}, {"type": "WordPiece"})
    with pytest.raises(ConfigError, match="none"):
        token_bytes({"a": 0}, {}, None)


def run_stops(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, str | None]:
    finder, out = StopStrings(stops), []
    for piece in pieces:
        released = finder.feed(piece)
        out.append(released.text)
        if released.matched is not None:
            return "".join(out), released.matched
    return "".join(out) + finder.flush(), None


def first_complete(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The rule, by brute force: the earliest end wins, of two the longer."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    st.integers(0, 9),
)
def test_stop_strings_are_found_across_any_cutting(text: str, stops: list[str], seed: int) -> None:
    pieces = ["".join(piece) for piece in cuts(list(text), random.Random(seed))]  # type: ignore[arg-type]
    assert run_stops(pieces, stops) == first_complete(text, stops)


def test_held_text_comes_out_once_it_is_no_beginning_of_a_stop() -> None:
    finder = StopStrings(["STOP"])
    assert finder.feed("so ST").text == "so "
    assert finder.feed("O").text == ""
    assert finder.feed("NE").text == "STONE"
    assert finder.flush() == ""


def answer(stops: Sequence[str] = (), **options: int) -> TextAnswer:
    return TextAnswer(Detokenizer(BYTES), stops, **options)


def test_tokens_behind_a_stop_string_are_dropped() -> None:
    ends = answer(["\n\n"])
    piece = ends.take(b"one\n\ntwo", None, None)
    assert piece is not None
    assert (piece.text, bytes(piece.token_ids), piece.finish, piece.matched_stop) == ("one", b"one\n\n", "stop", "\n\n")
    assert ends.num_tokens == 5


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    ends = answer(["a"], min_tokens=3)
    piece = ends.take(b"aaaba", None, None)
    assert piece is not None
    assert (piece.text, piece.finish) == ("aaab", "stop")


def test_a_stop_token_has_no_text_and_is_named() -> None:
    ends = answer()
    piece = ends.take(b"hi!", "stop", ord("!"))
    assert piece is not None
    assert (piece.text, bytes(piece.token_ids), piece.finish, piece.matched_stop) == ("hi", b"hi!", "stop", "33")
    assert ends.num_tokens == 3


def test_the_end_lets_out_what_was_held() -> None:
    ends = answer(["xyz"])
    assert [p.text if (p := ends.take(piece, None, None)) else None for piece in (b"ab", b"xy")] == ["ab", ""]
    last = ends.take((0xE2,), "length", None)
    assert last is not None and (last.text, last.finish, last.matched_stop) == ("xy\ufffd", "length", "")


def test_an_interval_gathers_tokens_after_the_first_piece() -> None:
    ends = answer(interval=3)
    sent = [ends.take((byte,), None, None) for byte in b"abcdefgh"]
    last = ends.take(b"i", "length", None)
    assert [piece.text for piece in (*sent, last) if piece] == ["a", "bcd", "efg", "hi"]


def test_an_end_without_tokens_is_a_piece() -> None:
    last = answer().take((), "length", None)
    assert last is not None and last.finish == "length" and last.token_ids == ()
