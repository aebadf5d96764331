"""grpc.health.v1: whether requests would be served, for probes that have no credential.

Knows one question only. Invariant: SERVING is said only while the fleet has a ready worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from pando.errors import NotFound, ResourceExhausted

POLL_S = 0.25
MAX_WATCHERS = 64


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers for `services` and for "", the whole server."""

    def __init__(self, ready: Callable[[], bool], services: Collection[str]) -> None:
        self._ready = ready
        self._services = frozenset({"", *services})
        self._watchers = 0
        self._stopping = False

    def stop(self) -> None:
        """Say NOT_SERVING from now on, and end the watchers once they have heard it."""
        self._stopping = True

    async def Check(self, request: pb.HealthCheckRequest, context: object) -> pb.HealthCheckResponse:
        if request.service not in self._services:
            raise NotFound("no such service is served here")
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: pb.HealthCheckRequest, context: object
    ) -> AsyncGenerator[pb.HealthCheckResponse, None]:
        if self._watchers >= MAX_WATCHERS:
            raise ResourceExhausted("too many watchers")
        self._watchers += 1
        try:
            said = None
            while True:
                status = self._status(request.service)
                if status != said:
                    said = status
                    yield pb.HealthCheckResponse(status=status)
                if self._stopping:
                    return
                await asyncio.sleep(POLL_S)
        finally:
            self._watchers -= 1

    def _status(self, service: str) -> pb.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        ready = self._ready() and not self._stopping
        return pb.HealthCheckResponse.SERVING if ready else pb.HealthCheckResponse.NOT_SERVING
