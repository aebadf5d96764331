"""What the clients take and give: keyword options to messages, messages to frozen results, statuses to errors.

Knows the public .proto and opens no connection. Invariant: every gRPC failure becomes the `pando.errors` type of its
code, with the reason, violations and retry hint that came with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from pando.errors import FieldViolation, InvalidRequest, PandoError, Unavailable, Unsupported, error_type
from pando.v1 import inference_pb2 as pb
from pando.v1 import prefixes_pb2

ChatTurn = Mapping[str, str]


class PromptOptions(TypedDict, total=False):
    """Exactly one of them; a chat is a sequence of {"role": ..., "content": ...}. `timeout` is in seconds."""

    text: str
    token_ids: Sequence[int]
    chat: Sequence[ChatTurn]
    model: str
    timeout: float


class GenerateOptions(PromptOptions, total=False):
    """A request; what each field means is written in `pando/v1/inference.proto`."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    logit_bias: Mapping[int, float]
    json_schema: str
    regex: str
    choice: Sequence[str]
    priority: int
    request_id: str
    no_store: bool
    stream_interval: int


class PrefixOptions(PromptOptions, total=False):
    """A prefix to publish: `scope` is "own", "group" or "public", `ttl_s` how long it stays pinned."""

    scope: str
    group: str
    ttl_s: float
    copies: int
    warm: bool
    name: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call took; milliseconds, counted by the router. prompt_tokens = computed + cached_tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached_device: int
    cached_cpu: int
    cached_remote: int
    cached_own: int
    cached_published: int
    predicted_cached_tokens: int
    blocks_copied: int
    queue_ms: float
    ttft_ms: float
    total_ms: float
    worker: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the n answers. `finish_reason` is "stop", "length", "cancelled" or "error"."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    matched_stop: str


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole result; text, token_ids, finish_reason and matched_stop are those of the first answer."""

    request_id: str
    model: str
    answers: tuple[Answer, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first answer's tokens."""
        return self.answers[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first answer ended."""
        return self.answers[0].finish_reason

    @property
    def matched_stop(self) -> str:
        """The stop string, or the decimal stop token id, that ended the first answer."""
        return self.answers[0].matched_stop


@dataclass(frozen=True, slots=True)
class Chunk:
    """More of answer `index`. `finish_reason` is "" until its last chunk, `usage` None until the last of the call."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    matched_stop: str
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the router serves; sizes in tokens."""

    name: str
    context_length: int
    vocab_size: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """A published prefix; `expires` in seconds since the epoch, `copies` the workers that hold it.

    `scope` is "own", "group" or "public".
    """

    id: str
    name: str
    num_tokens: int
    expires: float
    copies: int
    scope: str = "own"
    group: str = ""


_SCOPES = {
    "own": prefixes_pb2.PREFIX_SCOPE_OWN,
    "group": prefixes_pb2.PREFIX_SCOPE_GROUP,
    "public": prefixes_pb2.PREFIX_SCOPE_PUBLIC,
}
_FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
    pb.FINISH_REASON_ERROR: "error",
}
_REQUEST_FIELDS = frozenset({"model", "priority", "request_id", "stream_interval"})


def generate_request(options: GenerateOptions) -> pb.GenerateRequest:
    """The message. Raises `InvalidRequest` for anything that does not fit a field, TypeError for an unknown option."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given.pop("timeout", None)
    message = _prompt(given)
    message |= {name: given.pop(name) for name in _REQUEST_FIELDS & given.keys()}
    if given.pop("no_store", False):
        message["cache"] = pb.CacheControl(no_store=True)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if "choice" in given:
        given["choice"] = pb.Choice(options=given["choice"])
    _refuse_unknown(given, set(pb.Sampling.DESCRIPTOR.fields_by_name))
    with _value_errors():
        return pb.GenerateRequest(sampling=pb.Sampling(**given), **message)


def tokenize_request(options: PromptOptions) -> pb.TokenizeRequest:
    """The message for a text or a chat."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given.pop("timeout", None)
    message = _prompt(given) | {name: given.pop(name) for name in {"model"} & given.keys()}
    _refuse_unknown(given | ({"token_ids": 0} if "token_ids" in message else {}), set())
    with _value_errors():
        return pb.TokenizeRequest(**message)


def publish_request(options: PrefixOptions) -> prefixes_pb2.PublishPrefixRequest:
    """The message for a prefix to publish; its scope is "own" where none is given."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given.pop("timeout", None)
    message = _prompt(given)
    scope = given.pop("scope", "own")
    if scope not in _SCOPES:
        raise InvalidRequest(f"scope must be one of {', '.join(_SCOPES)}")
    if "ttl_s" in given:
        ttl = duration_pb2.Duration()
        ttl.FromMilliseconds(int(given.pop("ttl_s") * 1000))
        message["ttl"] = ttl
    _refuse_unknown(given, {"model", "group", "copies", "warm", "name"})
    with _value_errors():
        return prefixes_pb2.PublishPrefixRequest(scope=_SCOPES[scope], **message, **given)


def generation(message: pb.GenerateResponse) -> Generation:
    """A whole result."""
    answers = tuple(
        Answer(a.index, a.text, tuple(a.token_ids), _FINISH.get(a.finish_reason, ""), a.matched_stop)
        for a in message.answers
    )
    return Generation(message.request_id, message.model, answers, _usage(message.usage))


def chunk(message: pb.GenerateChunk) -> Chunk:
    """A piece of one."""
    return Chunk(
        message.request_id,
        message.index,
        message.text,
        tuple(message.token_ids),
        _FINISH.get(message.finish_reason, ""),
        message.matched_stop,
        _usage(message.usage) if message.HasField("usage") else None,
    )


def models(message: pb.ListModelsResponse) -> tuple[Model, ...]:
    """The models of a router."""
    return tuple(Model(m.name, m.context_length, m.vocab_size, m.block_size) for m in message.models)


def prefix(message: prefixes_pb2.Prefix) -> Prefix:
    """A published prefix."""
    expires = message.expires.seconds + message.expires.nanos * 1e-9
    scope = {number: name for name, number in _SCOPES.items()}.get(message.scope, "")
    return Prefix(message.id, message.name, message.num_tokens, expires, message.copies, scope, message.group)


@contextmanager
def typed_errors(target: str) -> Iterator[None]:
    """Turn a gRPC failure of a call to `target` inside into the `pando.errors` type of its code."""
    try:
        yield
    except grpc.RpcError as error:
        raise pando_error(error, target) from None


def pando_error(error: Any, target: str) -> PandoError:
    """The typed error of a failed call, from its code, its details and its trailing metadata."""
    details = _details(error)
    if is_unknown_method(error):
        return Unsupported(f"{target} does not serve this: it is not the gRPC port of a router")
    if not details.details and error.code() is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(_without_connection(error.details() or "", target))
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    bad, quota = error_details_pb2.BadRequest(), error_details_pb2.QuotaFailure()
    retry_after_s: float | None = None
    for detail in details.details:
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
            continue
        for message in (info, bad, quota):
            detail.Unpack(message)
    violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
    violations += [FieldViolation(v.subject, v.description) for v in quota.violations]
    return error_type(error.code())(
        error.details() or error.code().name,
        reason=info.reason or None,
        violations=tuple(violations),
        retry_after_s=retry_after_s,
        error_id=info.metadata.get("error_id", ""),
    )


def is_unknown_method(error: Any) -> bool:
    """Whether the server at the other end has no such method: gRPC's own words, of which there is no code."""
    return error.code() is grpc.StatusCode.UNIMPLEMENTED and error.details() in ("Method not found!", "unknown service")


def _without_connection(words: str, target: str) -> str:
    """What gRPC found about a connection, for people: it was never there, or it broke."""
    if "failed to connect" in words or "DNS resolution failed" in words or "name resolution" in words.lower():
        return f"nothing answers at {target}"
    return f"the connection to {target} was lost"


def _details(error: Any) -> status_pb2.Status:
    status = status_pb2.Status()
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            try:
                status.ParseFromString(value)
            except DecodeError:  # not of ours: the code and the words still stand
                return status_pb2.Status()
    return status


def _prompt(given: dict[str, Any]) -> dict[str, Any]:
    """Take the one prompt out of `given`, as a field of a message."""
    kinds = [kind for kind in ("text", "token_ids", "chat") if kind in given]
    if len(kinds) != 1:
        raise InvalidRequest("give exactly one of text, token_ids and chat")
    value = given.pop(kinds[0])
    with _value_errors():
        if kinds[0] == "token_ids":
            return {"token_ids": pb.TokenIds(ids=value)}
        if kinds[0] == "chat":
            return {"chat": pb.Chat(messages=[pb.ChatMessage(**turn) for turn in value])}
    return {"text": value}


@contextmanager
def _value_errors() -> Iterator[None]:
    """A value that no field of its name can hold is the caller's mistake, found here as it would be by the router."""
    try:
        yield
    except (TypeError, ValueError, UnicodeEncodeError) as error:
        raise InvalidRequest("a value is of the wrong type or out of its field's range") from error


def _refuse_unknown(given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}")


def _usage(message: pb.Usage) -> Usage:
    tier, scope = message.cached_by_tier, message.cached_by_scope
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        cached_device=tier.device,
        cached_cpu=tier.cpu,
        cached_remote=tier.remote,
        cached_own=scope.own,
        cached_published=scope.published,
        predicted_cached_tokens=message.predicted_cached_tokens,
        blocks_copied=message.blocks_copied,
        queue_ms=message.queue_ms,
        ttft_ms=message.ttft_ms,
        total_ms=message.total_ms,
        worker=message.worker,
        attempts=message.attempts,
    )
