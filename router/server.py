"""The two gRPC servers of a router: the public one and the admin one, each behind its gate.

Knows which service is on which port and who may call it; no service's inside. Invariant: a method without a rule here
needs a credential.
"""

from __future__ import annotations

import socket
from contextlib import closing
from dataclasses import dataclass, replace

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from kvstore.scope import TenantId
from pando.errors import ConfigError
from pando.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc, prefixes_pb2, prefixes_pb2_grpc
from router.admin_api import AdminService, RouterView
from router.auth import Authenticator, Metadata, require_admin
from router.grpc_api import RAW_CHECKS, InferenceService
from router.health import HealthService
from router.interceptors import Gate, GateLimits
from router.metrics import Metrics
from router.prefixes_api import PrefixesService
from router.tenants import Tenant

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
PREFIXES = prefixes_pb2.DESCRIPTOR.services_by_name["Prefixes"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
HEALTH = "grpc.health.v1.Health"

MAX_METADATA_BYTES = 8 * 1024
MAX_PORT = 65535

_NOBODY = Tenant(TenantId(""))


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What both servers have in common."""

    limits: GateLimits
    max_message_bytes: int
    reflection: bool
    shared_port: bool = False


@dataclass(frozen=True, slots=True)
class PublicServices:
    """What the public port serves."""

    inference: InferenceService
    prefixes: PrefixesService
    health: HealthService


def public_server(
    services: PublicServices,
    authenticator: Authenticator,
    metrics: Metrics,
    options: ServerOptions,
) -> grpc.aio.Server:
    """Inference, Prefixes, health and reflection."""

    def authorize(method: str, metadata: Metadata) -> Tenant:
        if method.startswith(f"/{HEALTH}/"):
            return _NOBODY
        return authenticator.tenant(metadata)

    server = _server(options, Gate(authorize, options.limits, raw_checks=RAW_CHECKS, observe=metrics.call))
    inference_pb2_grpc.add_InferenceServicer_to_server(services.inference, server)
    prefixes_pb2_grpc.add_PrefixesServicer_to_server(services.prefixes, server)
    health_pb2_grpc.add_HealthServicer_to_server(services.health, server)
    if options.reflection:
        enable_server_reflection((INFERENCE, PREFIXES, HEALTH, REFLECTION), server)
    return server


def admin_server(view: RouterView, admin_key: str, options: ServerOptions) -> grpc.aio.Server:
    """Admin and reflection, for holders of the admin key."""

    def authorize(method: str, metadata: Metadata) -> Tenant:
        require_admin(admin_key, metadata)
        return _NOBODY

    server = _server(replace(options, shared_port=False), Gate(authorize, options.limits, observe=view.metrics.call))
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(view), server)
    if options.reflection:
        enable_server_reflection((ADMIN, REFLECTION), server)
    return server


def listen(server: grpc.aio.Server, host: str, port: int, *, shared: bool = False) -> str:
    """Bind the server; gives "host:port". `ConfigError` if the port is taken, by one that does not share it."""
    check_free(host, port, shared=shared)
    try:
        bound = server.add_insecure_port(address(host, port))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address(host, port)}") from error
    return address(host, bound)


def check_free(host: str, port: int, *, shared: bool = False) -> None:
    """Raise `ConfigError` if something listens there: asked first because gRPC logs pages about it."""
    if port > MAX_PORT:
        raise ConfigError(f"cannot listen on port {port}: the highest is {MAX_PORT}")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind(where)
            if not shared:  # or a client could reach the probe
                probe.listen(1)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address(host, port)}: {error.strerror or 'no such address'}") from error


def address(host: str, port: int) -> str:
    """ "host:port", an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _server(options: ServerOptions, gate: Gate) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=(gate,),
        options=(
            ("grpc.so_reuseport", int(options.shared_port)),  # else a port that is taken is an error
            ("grpc.max_receive_message_length", options.max_message_bytes),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            # A vanished client is noticed, and its requests end, after this long.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
        ),
    )
