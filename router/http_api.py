"""The HTTP port: /health for load balancers and /metrics for Prometheus.

Knows nothing of requests for text. /health is open and says one word; /metrics names tenants and takes the admin key.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from pando.errors import ConfigError, Unauthenticated
from router.auth import require_admin
from router.metrics import Metrics

MAX_BODY_BYTES = 64 * 1024


class HttpServer:
    """Serves on one address from `start` to `stop`."""

    def __init__(self, metrics: Metrics, ready: Callable[[], bool], *, admin_key: str) -> None:
        """An empty `admin_key` leaves /metrics open too, which only a loopback address may."""
        self._metrics = metrics
        self._admin_key = admin_key
        self._ready = ready
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.add_routes([web.get("/health", self._health), web.get("/metrics", self._exposition)])
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)

    async def start(self, host: str, port: int) -> int:
        """Listen; gives the port. `ConfigError` if it is taken."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: the HTTP port is taken or not ours") from error
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Close the port and what is open on it."""
        await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        ready = self._ready()
        return web.json_response({"status": "ok" if ready else "no ready worker"}, status=200 if ready else 503)

    async def _exposition(self, request: web.Request) -> web.Response:
        try:
            require_admin(self._admin_key, ((name.lower(), value) for name, value in request.headers.items()))
        except Unauthenticated as error:
            return web.Response(status=401, text=error.message, headers={"WWW-Authenticate": "Bearer"})
        body, content_type = self._metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": content_type})
