"""Who may call a worker's port: whoever sends the link token that all routers and workers of a fleet have.

Knows no method but the one that stays open. Invariant: without the token nothing of a call is read.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from pando.errors import ConfigError
from pando.settings import is_loopback

# Tells a probe whether the worker serves, and nothing else.
_OPEN = "/grpc.health.v1.Health/Check"

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class LinkGuard(grpc.aio.ServerInterceptor):
    """Stands before every method of a server. An empty token lets every call pass, as on loopback it may."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode() if token else b""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """The handler where the call may pass, else one that refuses it, whatever the kind of the method."""
        if handler_call_details.method == _OPEN or self._has_token(handler_call_details.invocation_metadata or ()):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)

    def _has_token(self, metadata: Any) -> bool:
        if not self._expected:
            return True
        given = [value for name, value in metadata if name == "authorization"]
        return len(given) == 1 and hmac.compare_digest(_bytes(given[0]), self._expected)


def check_link_token(token: str, host: str) -> None:
    """Raise `ConfigError` if the port would be open on an address that others can reach."""
    if not token and not is_loopback(host):
        raise ConfigError(f"host {host} is not loopback: set the fleet's link token with PANDO_LINK_TOKEN")


async def _refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the link token is not valid")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
