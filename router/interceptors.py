"""The gate in front of every gRPC method: identity, the first message, time limits, and errors that stay inside.

Knows gRPC and no service. Invariant: a handler runs for a known caller, with a whole message, before its deadline; what
it raises leaves as a status with fixed words, and a defect as INTERNAL with an id that the log has.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from pando.errors import DeadlineExceeded, InternalError, InvalidRequest, PandoError, ResourceExhausted
from router.auth import Metadata
from router.tenants import Tenant

DOMAIN = "pando"
FIRST_MESSAGE_S = 5.0
SLOW_READER_S = 30.0
OWN_PREFIX = "/pando."
# What the router has waited for itself: a client that follows its retry policy would only wait as long again.
WAITED_FOR = frozenset({"NO_WORKER"})

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Authorize = Callable[[str, Metadata], Tenant]
RawCheck = Callable[[bytes], None]
Observe = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler of ours may know of its call: the caller, and when it must end, on the event loop's clock."""

    tenant: Tenant
    deadline: float


@dataclass(frozen=True, slots=True)
class GateLimits:
    """Seconds: a whole call, its first message, and one write to a client that does not read."""

    request_s: float
    first_message_s: float = FIRST_MESSAGE_S
    slow_reader_s: float = SLOW_READER_S


def _observe_nothing(method: str, code: str) -> None:
    """No one counts."""


class Gate(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server. Methods that do not exist pass, and stay UNIMPLEMENTED."""

    def __init__(
        self,
        authorize: Authorize,
        limits: GateLimits,
        *,
        raw_checks: Mapping[str, RawCheck] | None = None,
        observe: Observe = _observe_nothing,
    ) -> None:
        """`raw_checks`: by method, what is asked of a message before it is parsed; `observe`: told method and code."""
        self._authorize = authorize
        self._limits = limits
        self._raw_checks = dict(raw_checks or {})
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler, behind the gate: bytes in, bytes out, whatever the kind of the method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        metadata = handler_call_details.invocation_metadata or ()

        async def serve(_: object, context: Context) -> None:
            await self._contain(handler, method, metadata, context)

        return grpc.stream_stream_rpc_method_handler(serve)

    async def _contain(self, handler: Any, method: str, metadata: Any, context: Context) -> None:
        try:
            await self._serve(handler, method, metadata, context)
        except grpc.aio.AbortError:  # a handler of gRPC's own gave its status itself
            raise
        except PandoError as error:
            await self._refuse(method, error, context)
        except Exception as error:  # noqa: BLE001 - the one place where a defect of a handler is contained
            if context.done():
                return  # the client went away while we wrote to it
            await self._refuse(method, _defect(method, error), context)
        else:
            self._observe(method, "OK")

    async def _refuse(self, method: str, error: PandoError, context: Context) -> None:
        self._observe(method, error.wire.code.name)
        await context.abort(error.wire.code, error.message, error_metadata(error))

    async def _serve(self, handler: Any, method: str, metadata: Any, context: Context) -> None:
        tenant = self._authorize(method, metadata)
        if not method.startswith(OWN_PREFIX):
            await self._answer(handler, method, context, context)
            return
        left = context.time_remaining()
        seconds = self._limits.request_s if left is None else min(left, self._limits.request_s)
        if seconds <= 0:
            raise DeadlineExceeded("the deadline had passed when the request came")
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline) as scope:
                await self._answer(handler, method, context, Call(tenant, deadline))
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded("the request took longer than it may") from None

    async def _answer(self, handler: Any, method: str, context: Context, call: object) -> None:
        """Run a handler of any of the four kinds over raw bytes."""
        messages = self._messages(handler, method, context)
        serialize = handler.response_serializer
        request = messages if handler.request_streaming else await self._only(messages, context)
        if handler.request_streaming:
            answer = (handler.stream_stream if handler.response_streaming else handler.stream_unary)(request, call)
        else:
            answer = (handler.unary_stream if handler.response_streaming else handler.unary_unary)(request, call)
        if handler.response_streaming:
            await self._write_all(answer, serialize, context)
        else:
            await self._write(context, serialize(await answer))

    async def _write_all(self, answer: Any, serialize: Callable[[Any], bytes], context: Context) -> None:
        try:
            async for message in answer:
                await self._write(context, serialize(message))
        finally:
            await answer.aclose()

    async def _write(self, context: Context, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._limits.slow_reader_s) as scope:
                await context.write(message)
        except TimeoutError:
            if not scope.expired():
                raise
            raise ResourceExhausted("the client reads too slowly", reason="SLOW_READER") from None

    async def _messages(self, handler: Any, method: str, context: Context) -> AsyncIterator[Any]:
        """The call's messages, parsed; the first one has to come, and soon."""
        raw = await self._first(context)
        check = self._raw_checks.get(method)
        while raw is not grpc.aio.EOF:
            if check is not None:
                check(raw)
            yield _parse(handler.request_deserializer, raw)
            raw = await context.read()

    async def _only(self, messages: AsyncIterator[Any], context: Context) -> Any:
        """The message of a call that has one: the client says with it, or soon after, that no other follows."""
        message = await anext(messages)
        if await self._read(context, "the call did not end after its message") is not grpc.aio.EOF:
            raise InvalidRequest("the call has more than one message", reason="TOO_MANY_MESSAGES")
        return message

    async def _first(self, context: Context) -> Any:
        raw = await self._read(context, "no message came")
        if raw is grpc.aio.EOF:
            raise InvalidRequest("the call has no message", reason="NO_MESSAGE")
        return raw

    async def _read(self, context: Context, too_late: str) -> Any:
        try:
            async with asyncio.timeout(self._limits.first_message_s) as scope:
                return await context.read()
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(too_late, reason="NO_MESSAGE") from None


def error_metadata(error: PandoError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata that carries an error: google.rpc.Status, and when to come again."""
    details = status_pb2.Status(code=error.wire.code.value[0], message=error.message)
    _add_detail(details, _error_info(error))
    if error.violations:
        _add_detail(details, _violations(error))
    if error.retry_after_s is None:
        return (("grpc-status-details-bin", details.SerializeToString()),)
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(error.retry_after_s * 1000))
    _add_detail(details, error_details_pb2.RetryInfo(retry_delay=delay))
    pushback = "-1" if error.reason in WAITED_FOR else str(int(error.retry_after_s * 1000))
    return (("grpc-status-details-bin", details.SerializeToString()), ("grpc-retry-pushback-ms", pushback))


def _error_info(error: PandoError) -> error_details_pb2.ErrorInfo:
    metadata = {"error_id": error.error_id} if error.error_id else {}
    return error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)


def _violations(error: PandoError) -> error_details_pb2.BadRequest | error_details_pb2.QuotaFailure:
    if isinstance(error, ResourceExhausted):
        quota = error_details_pb2.QuotaFailure()
        for violation in error.violations:
            quota.violations.add(subject=violation.field, description=violation.description)
        return quota
    bad = error_details_pb2.BadRequest()
    for violation in error.violations:
        bad.field_violations.add(field=violation.field, description=violation.description)
    return bad


def _add_detail(details: status_pb2.Status, message: Any) -> None:
    details.details.add().Pack(message)


def _parse(deserialize: Callable[[bytes], Any] | None, raw: bytes) -> Any:
    if deserialize is None:
        return raw
    try:
        return deserialize(raw)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest("the message is malformed", reason="MALFORMED") from error


def _defect(method: str, error: Exception) -> InternalError:
    """Log where an exception came from, without its words: they may hold a prompt."""
    error_id = secrets.token_hex(8)
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    log.error("error %s in %s: %s at %s", error_id, method, type(error).__qualname__, where)
    return InternalError(f"internal error {error_id}", error_id=error_id)
