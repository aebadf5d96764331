"""The router's side of a purge against gRPC workers that answer, refuse or hang."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from kvstore.scope import ScopeRoot
from pando.worker.v1 import worker_pb2 as pb
from pando.worker.v1 import worker_pb2_grpc
from router.link_messages import Purged, WorkerHello
from router.worker_link import WorkerLink
from worker.link_guard import LinkGuard

ROOTS = [ScopeRoot(b"a" * 16), ScopeRoot(b"b" * 16)]


class Answers(worker_pb2_grpc.WorkerLinkServicer):
    async def Purge(self, request: pb.PurgeRequest, context: Any) -> pb.PurgeResponse:
        assert list(request.roots) == ROOTS
        return pb.PurgeResponse(device_blocks=7, cpu_blocks=5, remaining=3)


class Hangs(worker_pb2_grpc.WorkerLinkServicer):
    async def Purge(self, request: pb.PurgeRequest, context: Any) -> pb.PurgeResponse:
        await asyncio.sleep(30)
        raise AssertionError


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("servicer", "expected"),
    [(Answers, Purged(7, 5, 3)), (Hangs, None), (worker_pb2_grpc.WorkerLinkServicer, None), (None, None)],
    ids=["answers", "hangs", "knows no purge", "is not there"],
)
async def test_a_worker_that_does_not_answer_is_told_from_one_that_has_nothing(servicer: Any, expected: Any) -> None:
    server = grpc.aio.server()
    if servicer is not None:
        worker_pb2_grpc.add_WorkerLinkServicer_to_server(servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    if servicer is not None:
        await server.start()
    link = WorkerLink(f"127.0.0.1:{port}", router="r", expected=WorkerHello("w", 1, 16, "f"))
    assert await link.purge(ROOTS, 0.5) == expected
    await server.stop(0)


@pytest.mark.asyncio
@pytest.mark.parametrize(("token", "expected"), [("the token", Purged(7, 5, 3)), ("another", None), ("", None)])
async def test_a_worker_with_a_token_is_purged_by_its_own_routers(token: str, expected: Any) -> None:
    server = grpc.aio.server(interceptors=[LinkGuard("the token")])
    worker_pb2_grpc.add_WorkerLinkServicer_to_server(Answers(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = WorkerLink(f"127.0.0.1:{port}", router="r", expected=WorkerHello("w", 1, 16, "f"), token=token)
    assert await link.purge(ROOTS, 5.0) == expected
    await server.stop(0)
