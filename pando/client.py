"""Clients of a Pando router: `Client` for plain code, `AsyncClient` for asyncio, with the same names.

Knows the public services only: nothing of routers, workers or where they run. Every call has a deadline, and every
failure is a type of `pando.errors`.
"""

from __future__ import annotations

import json
import types
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, Self, Unpack

import grpc

from pando import messages
from pando.errors import InvalidRequest
from pando.messages import (
    Answer,
    Chunk,
    GenerateOptions,
    Generation,
    Model,
    Prefix,
    PrefixOptions,
    PromptOptions,
    Usage,
)
from pando.v1 import inference_pb2 as pb
from pando.v1 import inference_pb2_grpc, prefixes_pb2, prefixes_pb2_grpc

__all__ = ["Answer", "AsyncClient", "Chunk", "Client", "Generation", "Model", "Prefix", "Usage"]

DEFAULT_TIMEOUT_S = 60.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# What was refused before any work began is tried again: until a call's first message, gRPC knows that nothing was done.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "pando.v1.Inference"}, {"service": "pando.v1.Prefixes"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_CHANNEL_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Clients in one process do not share connections: closing one must not slow another.
    ("grpc.use_local_subchannel_pool", 1),
)


class _Connection:
    """What both clients are made of: an address, a credential and a default deadline."""

    _grpc: Any  # the module that makes channels of the client's kind

    def __init__(
        self,
        target: str,
        *,
        api_key: str = "",
        tenant: str = "",
        timeout: float = DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`target` is "host:port". `api_key` says who calls; `tenant` does on loopback, where there are no keys.
        `timeout` is for calls that set none, in seconds. `credentials` turn on TLS."""
        if api_key and tenant:
            raise InvalidRequest("give an api_key or a tenant, not both")
        self._target = target
        self._timeout = timeout
        self._metadata: tuple[tuple[str, str], ...] = ()
        if api_key:
            self._metadata = (("authorization", f"Bearer {api_key}"),)
        elif tenant:
            self._metadata = (("x-pando-tenant", tenant),)
        self._channel = self._open(target, credentials)
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._prefixes: Any = prefixes_pb2_grpc.PrefixesStub(self._channel)

    def _open(self, target: str, credentials: grpc.ChannelCredentials | None) -> Any:
        if credentials is None:
            return self._grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        return self._grpc.secure_channel(target, credentials, options=_CHANNEL_OPTIONS)

    def _call(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": self._timeout if timeout is None else timeout, "metadata": self._metadata}


class Client(_Connection):
    """A connection for plain code, for any number of threads; also a context manager."""

    _grpc = grpc

    def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """The answer to one prompt: text=, token_ids= or chat=."""
        request = messages.generate_request(options)
        with messages.typed_errors(self._target):
            return messages.generation(self._inference.Generate(request, **self._call(options.get("timeout"))))

    def stream(self, **options: Unpack[GenerateOptions]) -> Generator[Chunk, None, None]:
        """The answer as it is made. Closing the generator cancels the request."""
        return self._stream(messages.generate_request(options), options.get("timeout"))

    def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> Generator[Chunk, None, None]:
        with messages.typed_errors(self._target):
            call = self._inference.GenerateStream(request, **self._call(timeout))
            try:
                for message in call:
                    yield messages.chunk(message)
            finally:
                call.cancel()

    def tokenize(self, **options: Unpack[PromptOptions]) -> tuple[int, ...]:
        """The token ids that a prompt, text= or chat=, becomes."""
        request = messages.tokenize_request(options)
        with messages.typed_errors(self._target):
            return tuple(self._inference.Tokenize(request, **self._call(options.get("timeout"))).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids; special tokens have none."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        with messages.typed_errors(self._target):
            return str(self._inference.Detokenize(request, **self._call(timeout)).text)

    def list_models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """The models that the router serves."""
        with messages.typed_errors(self._target):
            return messages.models(self._inference.ListModels(pb.ListModelsRequest(), **self._call(timeout)))

    def publish_prefix(self, **options: Unpack[PrefixOptions]) -> Prefix:
        """Share a prompt head with a scope for some time."""
        request = messages.publish_request(options)
        with messages.typed_errors(self._target):
            return messages.prefix(self._prefixes.PublishPrefix(request, **self._call(options.get("timeout"))))

    def get_prefix(self, prefix_id: str, *, timeout: float | None = None) -> Prefix:
        """A published prefix that this tenant may use."""
        request = prefixes_pb2.GetPrefixRequest(id=prefix_id)
        with messages.typed_errors(self._target):
            return messages.prefix(self._prefixes.GetPrefix(request, **self._call(timeout)))

    def list_prefixes(self, *, timeout: float | None = None) -> tuple[Prefix, ...]:
        """All published prefixes that this tenant may use, oldest first."""
        found: list[Prefix] = []
        request = prefixes_pb2.ListPrefixesRequest()
        with messages.typed_errors(self._target):
            while True:
                page = self._prefixes.ListPrefixes(request, **self._call(timeout))
                found += map(messages.prefix, page.prefixes)
                if not page.next_page_token:
                    return tuple(found)
                request.page_token = page.next_page_token

    def delete_prefix(self, prefix_id: str, *, timeout: float | None = None) -> None:
        """End a prefix that this tenant published."""
        request = prefixes_pb2.DeletePrefixRequest(id=prefix_id)
        with messages.typed_errors(self._target):
            self._prefixes.DeletePrefix(request, **self._call(timeout))

    def close(self) -> None:
        """End the connection and every call on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Connection):
    """A connection for one event loop; also an asynchronous context manager."""

    _grpc = grpc.aio

    async def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """The answer to one prompt: text=, token_ids= or chat=. Cancelling the task cancels the request."""
        request = messages.generate_request(options)
        with messages.typed_errors(self._target):
            return messages.generation(await self._inference.Generate(request, **self._call(options.get("timeout"))))

    def stream(self, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk, None]:
        """The answer as it is made. Closing the generator cancels the request."""
        return self._stream(messages.generate_request(options), options.get("timeout"))

    async def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[Chunk, None]:
        with messages.typed_errors(self._target):
            call = self._inference.GenerateStream(request, **self._call(timeout))
            try:
                async for message in call:
                    yield messages.chunk(message)
            finally:
                call.cancel()

    async def tokenize(self, **options: Unpack[PromptOptions]) -> tuple[int, ...]:
        """The token ids that a prompt, text= or chat=, becomes."""
        request = messages.tokenize_request(options)
        with messages.typed_errors(self._target):
            response = await self._inference.Tokenize(request, **self._call(options.get("timeout")))
        return tuple(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids; special tokens have none."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        with messages.typed_errors(self._target):
            return str((await self._inference.Detokenize(request, **self._call(timeout))).text)

    async def list_models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """The models that the router serves."""
        with messages.typed_errors(self._target):
            return messages.models(await self._inference.ListModels(pb.ListModelsRequest(), **self._call(timeout)))

    async def publish_prefix(self, **options: Unpack[PrefixOptions]) -> Prefix:
        """Share a prompt head with a scope for some time."""
        request = messages.publish_request(options)
        with messages.typed_errors(self._target):
            return messages.prefix(await self._prefixes.PublishPrefix(request, **self._call(options.get("timeout"))))

    async def get_prefix(self, prefix_id: str, *, timeout: float | None = None) -> Prefix:
        """A published prefix that this tenant may use."""
        request = prefixes_pb2.GetPrefixRequest(id=prefix_id)
        with messages.typed_errors(self._target):
            return messages.prefix(await self._prefixes.GetPrefix(request, **self._call(timeout)))

    async def list_prefixes(self, *, timeout: float | None = None) -> tuple[Prefix, ...]:
        """All published prefixes that this tenant may use, oldest first."""
        found: list[Prefix] = []
        request = prefixes_pb2.ListPrefixesRequest()
        with messages.typed_errors(self._target):
            while True:
                page = await self._prefixes.ListPrefixes(request, **self._call(timeout))
                found += map(messages.prefix, page.prefixes)
                if not page.next_page_token:
                    return tuple(found)
                request.page_token = page.next_page_token

    async def delete_prefix(self, prefix_id: str, *, timeout: float | None = None) -> None:
        """End a prefix that this tenant published."""
        request = prefixes_pb2.DeletePrefixRequest(id=prefix_id)
        with messages.typed_errors(self._target):
            await self._prefixes.DeletePrefix(request, **self._call(timeout))

    async def close(self) -> None:
        """End the connection and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        await self.close()
