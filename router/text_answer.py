"""One answer while its tokens arrive: text, stop strings, and how much goes into a chunk.

Knows no network. Invariant: tokens after the one that completed a stop string are dropped, and text and token ids of
all pieces together are those of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.detokenizer import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What goes out next. `finish` is set on the last piece."""

    text: str
    token_ids: tuple[int, ...]
    finish: str | None
    matched_stop: str


class TextAnswer:
    """Takes tokens, gives pieces. Stop strings are not looked for in the first `min_tokens` tokens."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], min_tokens: int = 0, *, interval: int = 0
    ) -> None:
        self.num_tokens = 0
        self.finish: str | None = None
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self._min_tokens = min_tokens
        self._interval = interval
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._matched_stop = ""
        self._sent = False

    def take(self, token_ids: Sequence[int], finish: str | None, stop_token_id: int | None) -> TextPiece | None:
        """Add tokens; gives the piece to send now, None while the interval is not full.

        `stop_token_id` is the token that ended the answer with "stop": the last of `token_ids`, without text.
        """
        ended_by_token = finish == "stop" and stop_token_id is not None
        silent = ended_by_token and bool(token_ids) and token_ids[-1] == stop_token_id
        self._add(token_ids[:-1] if silent else token_ids)
        if silent and self.finish is None:
            self._count(token_ids[-1:])
        if finish is not None and self.finish is None:
            self._end(finish, str(stop_token_id) if ended_by_token else "")
        return self._piece()

    def _add(self, token_ids: Sequence[int]) -> None:
        if self._stops is None:
            self._count(token_ids)
            self._text.append(self._detokenizer.feed(token_ids))
            return
        for token in token_ids:
            self._count((token,))
            self._search(self._stops, self._detokenizer.feed((token,)))
            if self.finish is not None:
                return

    def _count(self, token_ids: Sequence[int]) -> None:
        self.num_tokens += len(token_ids)
        self._token_ids.extend(token_ids)

    def _search(self, stops: StopStrings, text: str) -> None:
        if self.num_tokens <= self._min_tokens:
            self._text.append(text)
            return
        released = stops.feed(text)
        self._text.append(released.text)
        if released.matched is not None:
            self.finish = "stop"
            self._matched_stop = released.matched

    def _end(self, finish: str, matched_stop: str) -> None:
        """The worker's end: what was held back comes out, unless it completes a stop string."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            self._text.append(rest)
        else:
            self._search(self._stops, rest)
            if self.finish is None:
                self._text.append(self._stops.flush())
        if self.finish is None:
            self.finish = finish
            self._matched_stop = matched_stop

    def _piece(self) -> TextPiece | None:
        if self.finish is None and self._sent and len(self._token_ids) < self._interval:
            return None
        if self.finish is None and not self._token_ids:
            return None
        piece = TextPiece("".join(self._text), tuple(self._token_ids), self.finish, self._matched_stop)
        self._text.clear()
        self._token_ids.clear()
        self._sent = True
        return piece
