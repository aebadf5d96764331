"""A GenerateRequest as it came to a frozen `Checked` request, or the error that says which field is wrong.

Knows the contract's limits and the model's card; no tenant, no tokenizer, no I/O. Invariant: a field that this version
does not serve is refused by name when it is set, never passed over.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pando.errors import FieldViolation, InvalidRequest, NotFound, PermissionDenied, Unsupported
from pando.v1 import inference_pb2 as pb
from router.chat_template import ChatMessage
from router.model_card import ModelCard

MAX_ANSWERS = 8
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_REQUEST_ID = 128
MAX_TEMPERATURE = 100.0
MAX_MESSAGES = 4096
# Below this a softmax over temperature is the likeliest token in float32, and dividing by it overflows.
GREEDY_BELOW = 1e-5
MAX_TOP_LEVEL_FIELDS = 64

Prompt = str | tuple[ChatMessage, ...] | array  # type: ignore[type-arg]


@dataclass(frozen=True, slots=True)
class Checked:
    """A request inside all limits that can be seen before its prompt is tokenized. `max_tokens` None: not asked for."""

    prompt: Prompt
    request_id: str
    n: int
    seed: int | None
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]  # the model's own included, unless ignored
    priority: int
    no_store: bool
    stream_interval: int


def check_request(request: pb.GenerateRequest, card: ModelCard) -> Checked:
    """Check every field; the first that is wrong raises."""
    check_model(request.model, card)
    sampling = request.sampling
    _check_penalties(sampling)
    _check_logprobs(sampling, card)
    _refuse_unsupported(sampling)
    if request.priority > 0:
        raise PermissionDenied("priority above 0 is above the tenant's entitlement", reason="PRIORITY")
    defaults = card.defaults
    eos = () if sampling.ignore_eos else card.eos_token_ids
    temperature = _real(sampling, "temperature", defaults.temperature, 0.0, MAX_TEMPERATURE)
    top_k = max(0, _whole(sampling, "top_k", defaults.top_k, -1, 2**31 - 1))
    return Checked(
        prompt=_prompt(request, card),
        request_id=_request_id(request.request_id),
        n=_whole(sampling, "n", 1, 1, MAX_ANSWERS),
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=_max_tokens(sampling),
        min_tokens=_whole(sampling, "min_tokens", 0, 0, 2**31 - 1),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=0 if top_k >= card.vocab_size else top_k,
        top_p=_real(sampling, "top_p", defaults.top_p, 0.0, 1.0, above=True),
        min_p=_real(sampling, "min_p", defaults.min_p, 0.0, 1.0),
        stop=_stops(sampling.stop),
        stop_token_ids=tuple(dict.fromkeys((*eos, *_stop_ids(sampling.stop_token_ids, card)))),
        priority=request.priority,
        no_store=request.cache.no_store,
        stream_interval=request.stream_interval,
    )


def fit_max_tokens(checked: Checked, num_prompt_tokens: int, card: ModelCard) -> int:
    """How many tokens the answer may have, now that the prompt's length is known."""
    if num_prompt_tokens < 1:
        raise wrong("prompt", "is empty", reason="EMPTY_PROMPT")
    room = card.context_length - num_prompt_tokens
    asked = checked.max_tokens
    if room < 1 or (asked is not None and asked > room):
        raise wrong(
            "prompt" if room < 1 else "sampling.max_tokens",
            f"{num_prompt_tokens} prompt tokens and {asked or 1} more do not fit a context of {card.context_length}",
            reason="CONTEXT_LENGTH",
        )
    chosen = asked if asked is not None else min(max(card.defaults.max_tokens, checked.min_tokens), room)
    if checked.min_tokens > chosen:
        raise wrong("sampling.min_tokens", f"is above the {chosen} tokens that may be generated")
    return chosen


def check_model(model: str, card: ModelCard) -> None:
    """Raise `NotFound` for another model than the one served."""
    if model not in ("", card.name):
        raise NotFound("no such model is served here", reason="MODEL")


def check_messages(chat: pb.Chat) -> tuple[ChatMessage, ...]:
    """The messages of a chat that has some, each with a known role."""
    if not chat.messages:
        raise wrong("chat.messages", "is empty", reason="EMPTY_PROMPT")
    if len(chat.messages) > MAX_MESSAGES:
        raise wrong("chat.messages", f"has more than {MAX_MESSAGES} messages")
    for at, message in enumerate(chat.messages):
        if message.role not in ("system", "user", "assistant"):
            raise wrong(f"chat.messages[{at}].role", "must be system, user or assistant")
    return tuple(ChatMessage(message.role, message.content) for message in chat.messages)


def check_length(field: str, ids: Sequence[int], most: int, card: ModelCard) -> None:
    """Raise for more than `most` ids, before any of them is looked at: a message can hold millions."""
    if len(ids) > most:
        raise wrong(field, f"do not fit a context of {card.context_length}", reason="CONTEXT_LENGTH")


def check_token_ids(field: str, ids: Sequence[int], card: ModelCard) -> None:
    """Raise, with its index, for the first id outside the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < card.vocab_size):
        at = next(at for at, token in enumerate(ids) if not 0 <= token < card.vocab_size)
        raise wrong(f"{field}[{at}]", f"is not a token id: the vocabulary has {card.vocab_size}")


def one_prompt_only(*fields: int) -> Callable[[bytes], None]:
    """A check of a raw message: at most one of the oneof's `fields` is on the wire, which a parsed one cannot tell."""

    def check(raw: bytes) -> None:
        if len({number for number in top_level_fields(raw) if number in fields}) > 1:
            raise wrong("prompt", "must be exactly one of text, token_ids and chat")

    return check


def top_level_fields(raw: bytes) -> list[int]:
    """Field numbers of a protobuf message in wire order; raises for one that is malformed or has far too many."""
    found: list[int] = []
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        found.append(tag >> 3)
        if len(found) > MAX_TOP_LEVEL_FIELDS:
            raise InvalidRequest("the message has too many fields", reason="MALFORMED")
        at = _skip(raw, at, tag & 7)
    return found


def wrong(field: str, description: str, *, reason: str | None = None) -> InvalidRequest:
    """The error for one field."""
    return InvalidRequest(f"{field} {description}", reason=reason, violations=(FieldViolation(field, description),))


def _prompt(request: pb.GenerateRequest, card: ModelCard) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        if not request.text:
            raise wrong("text", "is empty", reason="EMPTY_PROMPT")
        return request.text
    if kind == "chat":
        return check_messages(request.chat)
    if kind == "token_ids":
        ids = request.token_ids.ids
        if not ids:
            raise wrong("token_ids", "is empty", reason="EMPTY_PROMPT")
        check_length("token_ids", ids, card.context_length - 1, card)
        check_token_ids("token_ids.ids", ids, card)
        return array("I", ids)
    raise wrong("prompt", "must be exactly one of text, token_ids and chat")


def _request_id(request_id: str) -> str:
    if len(request_id) > MAX_REQUEST_ID or not all("!" <= character <= "~" for character in request_id):
        raise wrong("request_id", f"must be up to {MAX_REQUEST_ID} printable ASCII characters without spaces")
    return request_id


def _max_tokens(sampling: pb.Sampling) -> int | None:
    return _whole(sampling, "max_tokens", 1, 1, 2**31 - 1) if sampling.HasField("max_tokens") else None


def _whole(sampling: pb.Sampling, name: str, default: int, least: int, most: int) -> int:
    if not sampling.HasField(name):
        return default
    value: int = getattr(sampling, name)
    if not least <= value <= most:
        limit = f"from {least} to {most}" if most < 2**31 - 1 else f"{least} or more"
        raise wrong(f"sampling.{name}", f"must be {limit}")
    return value


def _real(sampling: pb.Sampling, name: str, default: float, least: float, most: float, *, above: bool = False) -> float:
    """A finite field from `least` to `most`; `above` leaves `least` itself out."""
    if not sampling.HasField(name):
        return default
    value: float = getattr(sampling, name)
    if not least <= value <= most or (above and value == least):
        raise wrong(f"sampling.{name}", f"must be {'above' if above else 'from'} {least:g} {'up ' * above}to {most:g}")
    return value


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise wrong("sampling.stop", f"has more than {MAX_STOPS} strings")
    for at, stop in enumerate(stops):
        if not stop or len(stop.encode()) > MAX_STOP_BYTES:
            raise wrong(f"sampling.stop[{at}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
    return tuple(stops)


def _stop_ids(ids: Sequence[int], card: ModelCard) -> Sequence[int]:
    if len(ids) > MAX_STOP_IDS:
        raise wrong("sampling.stop_token_ids", f"has more than {MAX_STOP_IDS} ids")
    check_token_ids("sampling.stop_token_ids", ids, card)
    return ids


def _check_penalties(sampling: pb.Sampling) -> None:
    """Out of range is wrong; in range and not neutral is of a later release."""
    presence = _real(sampling, "presence_penalty", 0.0, -2.0, 2.0)
    frequency = _real(sampling, "frequency_penalty", 0.0, -2.0, 2.0)
    repetition = _real(sampling, "repetition_penalty", 1.0, 0.0, 10.0, above=True)
    given = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition - 1.0}
    for name, strength in given.items():
        if strength != 0.0:
            raise _later(f"sampling.{name}")


def _check_logprobs(sampling: pb.Sampling, card: ModelCard) -> None:
    _whole(sampling, "logprobs", 0, 0, MAX_LOGPROBS)
    _whole(sampling, "prompt_logprobs", 0, 0, MAX_LOGPROBS)
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise wrong("sampling.logit_bias", f"has more than {MAX_LOGIT_BIAS} entries")
    for token, bias in sampling.logit_bias.items():
        if not math.isfinite(bias) or not 0 <= token < card.vocab_size:
            raise wrong("sampling.logit_bias", "must map token ids of the vocabulary to finite numbers")


def _refuse_unsupported(sampling: pb.Sampling) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if sampling.HasField(name):
            raise _later(f"sampling.{name}")
    if sampling.logit_bias:
        raise _later("sampling.logit_bias")
    constraint = sampling.WhichOneof("constraint")
    if constraint:
        raise _later(f"sampling.{constraint}")


def _later(field: str) -> Unsupported:
    return Unsupported(
        f"{field} is not served by this version", violations=(FieldViolation(field, "is not served by this version"),)
    )


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            break
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise InvalidRequest("the message is malformed", reason="MALFORMED")


def _skip(raw: bytes, at: int, wire_type: int) -> int:
    """Past the value of one field. Groups are legal and used by nobody: refused."""
    if wire_type == 0:
        return _varint(raw, at)[1]
    if wire_type == 2:
        size, at = _varint(raw, at)
        return at + size
    if wire_type in (1, 5):
        return at + (8 if wire_type == 1 else 4)
    raise InvalidRequest("the message is malformed", reason="MALFORMED")
