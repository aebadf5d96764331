"""The admin port as a client sees it: workers, tenants and totals of one router.

Knows the `pando.v1.Admin` service and its credential. Every call has a deadline; errors are `pando.errors` types.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import grpc

from pando.errors import PandoError, Unavailable, Unsupported, error_type
from pando.messages import is_unknown_method
from pando.v1 import admin_pb2, admin_pb2_grpc


class AdminClient:
    """A connection to the admin port at "host:port"; `key` is its bearer key, empty on loopback without keys."""

    def __init__(self, target: str, *, key: str = "", timeout_s: float = 5.0) -> None:
        self._target = target
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(target)
        self._stub: Any = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def workers(self) -> list[admin_pb2.Worker]:
        """Every worker the router knows."""
        return list(self._call(self._stub.ListWorkers, admin_pb2.ListWorkersRequest()).workers)

    def tenants(self) -> list[admin_pb2.Tenant]:
        """Every tenant the router has served."""
        return list(self._call(self._stub.ListTenants, admin_pb2.ListTenantsRequest()).tenants)

    def stats(self) -> admin_pb2.GetStatsResponse:
        """The router's totals."""
        totals: admin_pb2.GetStatsResponse = self._call(self._stub.GetStats, admin_pb2.GetStatsRequest())
        return totals

    def explain(self, request_id: str) -> admin_pb2.ExplainPlacementResponse:
        """Where the router placed a recent request, and what each worker would have cost."""
        request = admin_pb2.ExplainPlacementRequest(request_id=request_id)
        placement: admin_pb2.ExplainPlacementResponse = self._call(self._stub.ExplainPlacement, request)
        return placement

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._typed(error) from None

    def _typed(self, error: grpc.RpcError) -> PandoError:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return Unavailable(f"nothing answers at {self._target}")
        if is_unknown_method(error):
            return Unsupported(f"{self._target} is not an admin port")
        return error_type(error.code())(error.details() or error.code().name)
