"""The worker's end of the link: gRPC sessions of routers on one side, the engine's queue on the other.

Knows no text and no tenant; `link_messages` reads and writes what crosses the wire. All of it lives on one event loop;
the engine's thread enters by `deliver`, once a step. A sequence belongs to one session and dies with it; pins do not.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import aclosing
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvstore.ledger import Told
from pando.errors import ConfigError, InvalidRequest
from pando.worker.v1 import worker_pb2 as pb
from pando.worker.v1 import worker_pb2_grpc
from worker.block_peers import BlockPeers, PeerLacks, PeerRefused
from worker.engine import Engine, Load, StepReport
from worker.engine_work import EngineStopped
from worker.link_guard import LinkGuard
from worker.link_messages import pin_request, pull_order, purge_roots, sequence_request, worker_messages
from worker.offload import Offload
from worker.publisher import Publisher
from worker.sequence import Finish, SequenceOutput
from worker.session import Attempt, RouterSession

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
STOP_GRACE_S = 0.2
EXPORT_TIMEOUT_S = 10.0
SERVICE = "pando.worker.v1.WorkerLink"

# Routers ping every second or so on idle links to notice a hang; the same towards them ends a dead router's sequences.
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who this worker is, under the names of a hello."""

    worker: str
    epoch: int
    model: str
    block_size: int
    key_fingerprint: str
    max_model_len: int
    vocab_size: int
    device_blocks: int
    pid: int


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where an engine's sequence came from."""

    session: RouterSession
    attempt: Attempt


class LinkServer(worker_pb2_grpc.WorkerLinkServicer):
    """Serves `WorkerLink` and health. `deliver` is for the engine's thread, the rest for the loop's."""

    def __init__(
        self, engine: Engine, identity: WorkerIdentity, *, token: str = "", offload: Offload | None = None
    ) -> None:
        """`token` is asked of every caller; without one anybody may call. Blocks are exchanged over a CPU tier only."""
        self._engine = engine
        self._identity = identity
        self._peers: BlockPeers | None = None
        if offload is not None:
            fingerprint = identity.key_fingerprint
            self._peers = BlockPeers(engine, offload, epoch=identity.epoch, key_fingerprint=fingerprint, token=token)
        self._loop = asyncio.get_running_loop()
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[LinkGuard(token)])
        self._health = health.aio.HealthServicer()
        self._sessions: set[RouterSession] = set()
        self._origins: dict[int, _Origin] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._ids = count(1)
        self.publisher: Publisher | None = None
        """Who tells routers of block events, once there is one."""
        self._load = Load(device_blocks=identity.device_blocks)
        self._draining = False

    async def start(self, host: str, port: int) -> str:
        """Listen; the address as "host:port". Raises `ConfigError` when the port is taken."""
        worker_pb2_grpc.add_WorkerLinkServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"[{host}]" if ":" in host else host
        try:
            # gRPC says why it cannot bind in lines of its own; a socket keeps silent.
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
            bound = self._server.add_insecure_port(f"{address}:{port}")
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"cannot listen on {address}:{port}") from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return f"{address}:{bound}"

    async def stop(self) -> None:
        """End all sessions and stop listening."""
        if self._peers is not None:
            await self._peers.stop()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(STOP_GRACE_S)

    # From the engine's thread

    def deliver(self, report: StepReport) -> None:
        """Hand over what a step has to say: one wake-up of the loop."""
        if report.outputs or report.load is not None:
            self._loop.call_soon_threadsafe(self._deliver, report)

    @property
    def draining(self) -> bool:
        return self._draining

    # gRPC

    async def Session(self, request_iterator: object, context: Context) -> None:
        try:
            await self._serve(context)
        except grpc.aio.AbortError:
            raise
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message that is none of ours")
        except Exception:  # the containment of a session: gRPC would hand the exception's text to the peer
            logger.exception("a session failed")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        if request.epoch != self._identity.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another epoch of this worker")
        finished, cancelled = await self.drain(request.deadline_ms / 1e3 or None)
        return pb.DrainResponse(finished=finished, cancelled=cancelled)

    async def FetchBlocks(self, request: pb.FetchBlocksRequest, context: Context) -> None:
        if self._peers is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker has no CPU tier")
        try:
            exported = self._peers.chunks(request, self._identity.vocab_size)
            async with asyncio.timeout(EXPORT_TIMEOUT_S), aclosing(exported) as chunks:
                async for chunk in chunks:
                    await context.write(chunk)
        except TimeoutError:
            return  # what went in time is all that there is
        except PeerLacks as lacks:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(lacks))
        except PeerRefused as refused:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(refused))
        except EngineStopped:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this worker stops")
        except Exception:  # the containment of an export, as of a session
            logger.exception("an export of blocks failed")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    async def Purge(self, request: pb.PurgeRequest, context: Context) -> pb.PurgeResponse:
        if self._peers is not None:
            self._peers.hurry_all()  # the engine ends what it has, and what is on its way is void
        try:
            roots = purge_roots(request)
            count = await asyncio.wrap_future(self._engine.purge(roots))
        except InvalidRequest:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a scope root has 16 bytes")
        except EngineStopped:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this worker stops")
        return pb.PurgeResponse(**asdict(count))

    async def drain(self, timeout_s: float | None) -> tuple[int, int]:
        """Take no more requests and wait for the running ones; how many finished and how many were cancelled."""
        self._draining = True
        if self._peers is not None:
            self._peers.hurry_all()  # what was taken before goes on
        self._engine.drain()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        present = len(self._origins)
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_left.wait()
        except TimeoutError:
            late = list(self._origins)
            for engine_id in late:
                self._cancel(engine_id)
            await self._none_left.wait()
            return present - len(late), len(late)
        return present, 0

    # A session

    async def _serve(self, context: Context) -> None:
        hello = await self._first_message(context)
        await self._refuse_stranger(hello, context)
        session = RouterSession(hello.router)
        self._sessions.add(session)
        try:
            await context.write(pb.WorkerMessage(hello=self._hello()))
            session.set_load(self._load)
            await self._converse(session, context)
        except grpc.aio.UsageError:
            logger.info("the session of router %r broke", session.router)
        finally:
            self._close(session)

    async def _first_message(self, context: Context) -> pb.RouterHello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                message = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello in time")
        if message is grpc.aio.EOF or message.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a session begins with a hello")
        hello: pb.RouterHello = message.hello
        return hello

    async def _refuse_stranger(self, hello: pb.RouterHello, context: Context) -> None:
        if hello.epoch != self._identity.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another epoch of this worker")
        if hello.key_fingerprint != self._identity.key_fingerprint:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another key fingerprint")

    async def _converse(self, session: RouterSession, context: Context) -> None:
        """Read and write at once until the router ends the session."""
        tasks = [asyncio.create_task(self._read(session, context)), asyncio.create_task(_write(session, context))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, session: RouterSession, context: Context) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            self._take(session, message)

    def _take(self, session: RouterSession, message: pb.RouterMessage) -> None:
        match message.WhichOneof("message"):
            case "submit":
                self._submit(session, message.submit)
            case "cancel" if message.cancel.sequence in session.engine_ids:
                self._cancel(session.engine_ids[message.cancel.sequence])
            case "pin":
                self._pin(message.pin, session)
            case "unpin":
                self._engine.unpin(message.unpin.prefix.hex())
            case "ping":
                session.add_pong(message.ping.nonce)
            case "follow" | "unfollow" | "republish" as request if self.publisher is not None:
                self._feed(session, request, message.follow.seq)

    def _submit(self, session: RouterSession, submit: pb.Submit) -> None:
        """Hand a Submit to the engine: one sequence, or several that have their prompt in common."""
        numbers = [submit.sequence, *(fork.sequence for fork in submit.forks)]
        engine_ids = [next(self._ids) for _ in numbers]
        taken = len(set(numbers)) < len(numbers) or not session.engine_ids.keys().isdisjoint(numbers)
        reason = "DRAINING" if self._draining else "MALFORMED" if taken else ""
        if not reason:
            try:
                request = sequence_request(submit, engine_ids, self._identity.vocab_size, self._engine.clock())
            except InvalidRequest as error:
                reason = error.reason
        if reason:
            # A fork's number that a live sequence has would end that one.
            for number in set(numbers) - (session.engine_ids.keys() - {submit.sequence}):
                rejected = SequenceOutput(engine_ids[0], 0, finish=Finish.REJECTED, reason=reason)
                session.add_output(Attempt(number, submit.attempt), rejected)
            return
        for number, engine_id in zip(numbers, engine_ids, strict=True):
            session.engine_ids[number] = engine_id
            self._origins[engine_id] = _Origin(session, Attempt(number, submit.attempt))
        self._none_left.clear()
        order = pull_order(submit)
        if self._peers is not None and order is not None:
            self._peers.submit(request, order)
        else:
            self._engine.submit(request)

    def _cancel(self, engine_id: int) -> None:
        if self._peers is not None:
            self._peers.hurry(engine_id)
        self._engine.cancel(engine_id)

    def _pin(self, pin: pb.Pin, session: RouterSession) -> None:
        try:
            self._engine.pin(pin_request(pin, self._identity.vocab_size))
        except InvalidRequest:
            logger.warning("router %r sent a pin that makes no sense", session.router)

    def _feed(self, session: RouterSession, request: str, seq: int) -> None:
        assert self.publisher is not None
        if request == "republish":
            self.publisher.republish()
            return
        if session.listener is not None:
            self.publisher.unfollow(session.listener)
            session.listener = None
        if request == "follow":

            def hear(told: Told) -> None:
                self._loop.call_soon_threadsafe(session.add_feed, told)

            session.listener = hear
            self.publisher.follow(hear, seq)

    def _close(self, session: RouterSession) -> None:
        """Its sequences are nobody's now: end them."""
        self._sessions.discard(session)
        if session.listener is not None and self.publisher is not None:
            self.publisher.unfollow(session.listener)
        for engine_id in session.engine_ids.values():
            self._forget(engine_id)
            self._cancel(engine_id)
        session.engine_ids.clear()

    def _forget(self, engine_id: int) -> None:
        del self._origins[engine_id]
        if not self._origins:
            self._none_left.set()

    # On the loop

    def _deliver(self, report: StepReport) -> None:
        for output in report.outputs:
            origin = self._origins.get(output.sequence_id)
            if origin is None:
                continue
            origin.session.add_output(origin.attempt, output)
            if output.finish is not None:
                del origin.session.engine_ids[origin.attempt.sequence]
                self._forget(output.sequence_id)
        if report.load is not None and report.load != self._load:
            self._load = report.load
            for session in self._sessions:
                session.set_load(report.load)

    def _hello(self) -> pb.WorkerHello:
        return pb.WorkerHello(**asdict(self._identity))

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


async def _write(session: RouterSession, context: Context) -> None:
    while True:
        for message in worker_messages(await session.news()):
            await context.write(message)
