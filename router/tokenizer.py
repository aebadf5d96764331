"""Text and chats to token ids, in threads beside the event loop, and the byte table that goes the other way.

Knows the tokenizer files of one model. Invariant: the text of a special token inside a caller's text is plain text;
only the chat template and the tokenizer's own post-processing make special tokens.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer as TokenizerFile

from pando.errors import ConfigError, DeadlineExceeded, InvalidRequest, Unsupported
from router.chat_template import (
    ChatMessage,
    ChatTemplate,
    read_chat_template,
    read_tokenizer_config,
    special_token_texts,
)
from router.detokenizer import Detokenizer, token_bytes
from router.model_card import read_json

T = TypeVar("T")

TIME_CAP_S = 10.0
# Normalizers make text shorter, at most by about this factor (composition of combining marks).
_SHRINK = 4


class SpecialTokenGuard:
    """Breaks up special-token text by a secret mark that the tokenizer's normalizer takes out again.

    Special tokens are looked for before normalization, so broken ones are not found; what is then encoded is the text
    as it was written.
    """

    def __init__(self, special_texts: Iterable[str], mark: str) -> None:
        self._specials = tuple(text for text in special_texts if text)
        self._beginnings = frozenset(text[:size] for text in self._specials for size in range(1, len(text)))
        self._longest = max((len(text) for text in self._specials), default=0)
        self._mark = mark

    def escape(self, text: str) -> str:
        """`text` with the mark behind the first character of every special token in it, and of one begun at its end."""
        if self._mark in text:
            raise InvalidRequest("the text contains a reserved character sequence")
        places = sorted({*self._starts(text), *self._begun_at_end(text)})
        if not places:
            return text
        cuts = [0, *(place + 1 for place in places), len(text)]
        return self._mark.join(text[a:b] for a, b in pairwise(cuts))

    def _starts(self, text: str) -> Iterable[int]:
        """Where special tokens begin, overlapping ones too."""
        for special in self._specials:
            at = text.find(special)
            while at >= 0:
                yield at
                at = text.find(special, at + 1)

    def _begun_at_end(self, text: str) -> Iterable[int]:
        for size in range(1, min(self._longest, len(text) + 1)):
            if text[len(text) - size :] in self._beginnings:
                yield len(text) - size


class Tokenizer:
    """The tokenizer of one model folder. Encoding runs in `threads` threads and never on the event loop."""

    def __init__(self, folder: Path, *, threads: int = 2, max_tokens: Callable[[], int] = lambda: 1 << 20) -> None:
        """`max_tokens`: the longest prompt that a worker takes now; a text that must be longer is refused unread."""
        mark = "".join(chr(0xFDD0 + secrets.randbelow(32)) for _ in range(8))  # noncharacters: no text holds them
        config = read_tokenizer_config(folder)
        described = read_json(folder / "tokenizer.json")
        added = _added_tokens(described)
        self._file = _with_mark(described, mark)
        self._guard = SpecialTokenGuard((text for text, special in added.values() if special), mark)
        self._template: ChatTemplate | None = read_chat_template(folder, config)
        self._bytes = token_bytes(self._file.get_vocab(with_added_tokens=False), added, described.get("decoder"))
        self._bos = self._bos_rule(config)
        self._max_tokens = max_tokens
        self._token_bytes = _SHRINK * max((len(piece) for piece in self._bytes.pieces), default=1)
        self._threads = ThreadPoolExecutor(max(1, threads), thread_name_prefix="tokenizer")

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._bytes.pieces)

    async def encode(self, text: str) -> array[int]:
        """Token ids of a text prompt, with the beginning-of-sequence token where the model wants one."""
        return await self._run(len(text), lambda: self.encode_now(text))

    async def encode_chat(self, messages: Sequence[ChatMessage], *, answer: bool = True) -> array[int]:
        """Token ids of a chat, rendered by the model's template up to where the assistant speaks.

        Without `answer` up to the end of the last message: the head of every chat that begins with these messages.
        """
        size = sum(len(message.content) for message in messages)
        return await self._run(size, lambda: self.encode_chat_now(messages, answer=answer))

    def encode_now(self, text: str) -> array[int]:
        """As `encode`, on the calling thread."""
        ids = self._ids(self._guard.escape(text), specials=self._bos is not False)
        if self._bos is not None and self._bos is not False and ids[:1] != array("I", [self._bos]):
            ids.insert(0, self._bos)
        return ids

    def encode_chat_now(self, messages: Sequence[ChatMessage], *, answer: bool = True) -> array[int]:
        """As `encode_chat`, on the calling thread."""
        if self._template is None:
            raise Unsupported("this model has no chat template: send text or token_ids", reason="NO_CHAT_TEMPLATE")
        escaped = [ChatMessage(message.role, self._guard.escape(message.content)) for message in messages]
        return self._ids(self._template.render(escaped, add_generation_prompt=answer), specials=False)

    def detokenizer(self) -> Detokenizer:
        """For the text of an answer, which goes on after its prompt."""
        return Detokenizer(self._bytes)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids on their own; special tokens have none."""
        return await self._run(0, lambda: self.decode_now(token_ids))

    def decode_now(self, token_ids: Sequence[int]) -> str:
        """As `decode`, on the calling thread."""
        whole = Detokenizer(self._bytes, continues=False)
        return whole.feed(token_ids) + whole.flush()

    def close(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        if size > self._max_tokens() * self._token_bytes:
            raise InvalidRequest("the prompt is longer than the model's context", reason="CONTEXT_LENGTH")
        try:
            async with asyncio.timeout(TIME_CAP_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError as error:
            raise DeadlineExceeded("tokenizing the prompt took too long", reason="TOKENIZER_TIME") from error

    def _ids(self, text: str, *, specials: bool) -> array[int]:
        # The batch call lets go of the interpreter lock while it works, the single one does not.
        [encoding] = self._file.encode_batch_fast([text], add_special_tokens=specials)
        most = self._max_tokens()
        if len(encoding) > most:  # said before the ids, which may be millions, become Python's
            raise InvalidRequest(
                f"the prompt has {len(encoding)} tokens and the model's context {most}",
                reason="CONTEXT_LENGTH",
            )
        return array("I", encoding.ids)

    def _bos_rule(self, config: dict[str, Any]) -> int | bool | None:
        """The id that must come first, False where none may be added, None to leave it to the tokenizer file."""
        wanted = config.get("add_bos_token")
        if wanted is not True:
            return False if wanted is False else None
        return self._file.token_to_id(special_token_texts(config).get("bos_token", ""))


def _with_mark(described: dict[str, Any], mark: str) -> TokenizerFile:
    """The tokenizer, taking `mark` out of every text after special tokens were looked for and before all else."""
    remove = {"type": "Replace", "pattern": {"String": mark}, "content": ""}
    rest = described.get("normalizer")
    added = [token | ({"normalized": False} if token.get("special") else {}) for token in described["added_tokens"]]
    changed = described | {
        "normalizer": {"type": "Sequence", "normalizers": [remove, rest] if rest else [remove]},
        "added_tokens": added,
        "truncation": None,
        "padding": None,
    }
    try:
        return TokenizerFile.from_str(json.dumps(changed))
    except Exception as error:  # tokenizers raises no narrower type
        raise ConfigError("tokenizer.json cannot be loaded") from error


def _added_tokens(described: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    described.setdefault("added_tokens", [])
    try:
        return {
            int(token["id"]): (str(token["content"]), bool(token["special"])) for token in described["added_tokens"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("tokenizer.json has a malformed added token") from error
