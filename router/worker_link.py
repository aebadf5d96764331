"""The router's end of the link to one worker: one gRPC session that carries every sequence of the pair.

Knows no placement and no text; the only router file that calls the worker's stubs. Invariant: when the session
breaks, every stream open on it ends with `WorkerLost` at once, and nothing of an old session is delivered any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from kvstore.block import WorkerId
from kvstore.following import FeedRequest, Following
from kvstore.scope import ScopeRoot
from pando.worker.v1 import worker_pb2 as pb
from pando.worker.v1 import worker_pb2_grpc
from router.link_messages import (
    LinkOutput,
    PinOrder,
    Purged,
    Submission,
    WorkerHello,
    WorkerLoad,
    feed_message,
    link_output,
    pin_message,
    snapshot_part,
    submit_message,
    worker_load,
)

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 3.0
BACKOFF_FIRST_S = 0.05
BACKOFF_MOST_S = 1.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# A crashed worker's kernel resets the connection; a hung one only stays silent. Keepalive alone takes gRPC a minute to
# give up on it: the ping timeout is what ends the session. Channels share nothing, so no backoff of an old one lingers.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


class WorkerLost(Exception):
    """The session with the worker ended while a sequence was open on it."""


class LinkStream:
    """The outputs of a submission, waiting to be taken; a slow reader finds them together.

    `sequences` are its number on the link and those of its forks.
    """

    __slots__ = ("_lost", "_news", "_outputs", "sequences")

    def __init__(self, sequences: tuple[int, ...]) -> None:
        self.sequences = sequences
        self._outputs: list[LinkOutput] = []
        self._news = asyncio.Event()
        self._lost = False

    async def take(self) -> list[LinkOutput]:
        """All outputs since the last call, at least one; waits for it. Raises `WorkerLost` once none is left."""
        await self._news.wait()
        self._news.clear()
        outputs, self._outputs = self._outputs, []
        if self._lost:
            self._news.set()
            if not outputs:
                raise WorkerLost
        return outputs

    def _put(self, output: LinkOutput) -> None:
        self._outputs.append(output)
        self._news.set()

    def _lose(self) -> None:
        self._lost = True
        self._news.set()


class WorkerLink:
    """Keeps a session with one life of a worker, for one event loop; reconnects with backoff until it is stopped.

    `on_change` is called when the session comes up, breaks, or the worker reports its load. `following` is told of the
    session, may ask over it for block events, and gets them.
    """

    def __init__(
        self,
        address: str,
        *,
        router: str,
        expected: WorkerHello,
        token: str = "",
        on_change: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
        following: Following | None = None,
    ) -> None:
        self.address = address
        self.live = False
        self.load: WorkerLoad | None = None
        self.num_loads = 0
        self.reason = "connecting"
        self._router = router
        self._expected = expected
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._on_change = on_change
        self._following = following
        self._worker = WorkerId(expected.worker)
        self._rng = rng or random.Random()
        self._sequences = itertools.count(1)
        self._streams: dict[int, LinkStream] = {}
        self._outgoing: asyncio.Queue[pb.RouterMessage] = asyncio.Queue()
        self._stopped = False
        self._task: asyncio.Task[None] | None = None

    @property
    def num_streams(self) -> int:
        """Sequences open on this link."""
        return len(self._streams)

    def start(self) -> None:
        """Begin to connect, in the background. Idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep(), name=f"worker-link {self._expected.worker}")

    async def stop(self) -> None:
        """End the session; open streams are lost. Idempotent."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def submit(self, submission: Submission) -> LinkStream:
        """Send a request; outputs of it and its forks arrive in one stream. Raises `WorkerLost` without a session."""
        if not self.live:
            raise WorkerLost
        stream = LinkStream(tuple(next(self._sequences) for _ in (0, *submission.fork_seeds)))
        self._streams.update(dict.fromkeys(stream.sequences, stream))
        self._outgoing.put_nowait(pb.RouterMessage(submit=submit_message(stream.sequences, submission)))
        return stream

    def close(self, stream: LinkStream) -> None:
        """Forget a stream and cancel what of it the worker has not ended. Idempotent, never waits."""
        for fork in range(len(stream.sequences)):
            self.cancel(stream, fork)

    def cancel(self, stream: LinkStream, fork: int) -> None:
        """As `close`, for one sequence of a stream: 0 is the first, i its i-th fork."""
        sequence = stream.sequences[fork]
        if self._streams.pop(sequence, None) is not None:
            self._outgoing.put_nowait(pb.RouterMessage(cancel=pb.Cancel(sequence=sequence)))

    def pin(self, order: PinOrder) -> bool:
        """Ask the worker to keep the blocks of a prefix; whether there is a session to say it on."""
        if self.live:
            self._outgoing.put_nowait(pb.RouterMessage(pin=pin_message(order)))
        return self.live

    def unpin(self, prefix: bytes) -> None:
        """Take a pin back, if there is a session; else it ends by its own time."""
        if self.live:
            self._outgoing.put_nowait(pb.RouterMessage(unpin=pb.Unpin(prefix=prefix)))

    async def purge(self, roots: Sequence[ScopeRoot], timeout_s: float) -> Purged | None:
        """Have the worker forget all blocks of the scopes; None if it did not answer."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stub = worker_pb2_grpc.WorkerLinkStub(channel)
            try:
                answer = await stub.Purge(pb.PurgeRequest(roots=roots), timeout=timeout_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                logger.warning("worker %s did not purge: %s", self._expected.worker, error.code().name)
                return None
        return Purged(answer.device_blocks, answer.cpu_blocks, answer.remaining)

    async def _keep(self) -> None:
        backoff = BACKOFF_FIRST_S
        while not self._stopped:
            was_live = await self._one_session()
            backoff = BACKOFF_FIRST_S if was_live else min(2 * backoff, BACKOFF_MOST_S)
            await asyncio.sleep(backoff * self._rng.uniform(0.5, 1.0))

    async def _one_session(self) -> bool:
        """Connect, serve until it breaks, clean up; whether the session had come up."""
        was_live = False
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            try:
                stub = worker_pb2_grpc.WorkerLinkStub(channel)
                messages = aiter(stub.Session(self._messages(), metadata=self._metadata))
                await self._greet(messages)
                was_live = True
                async for message in messages:
                    self._take(message)
                self._down("the worker ended the session")
            except grpc.aio.AioRpcError as error:
                self._down(_reason(error))
            except grpc.aio.BaseError:
                self._down("the session failed inside gRPC")
            except asyncio.CancelledError:
                # gRPC says so too when it gave up the call itself: only a cancel of this task may end the task.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                self._down("gRPC cancelled the session")
            except TimeoutError:
                self._down("no hello from the worker")
            except _Stranger as error:
                self._down(str(error))
            finally:
                self._lose_all()
        return was_live

    async def _greet(self, messages: AsyncIterator[pb.WorkerMessage]) -> None:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            message = await anext(messages, None)
        if message is None or not message.HasField("hello"):
            raise _Stranger("the worker began without a hello")
        hello = message.hello
        said = WorkerHello(hello.worker, hello.epoch, hello.block_size, hello.key_fingerprint)
        if said != self._expected:
            raise _Stranger("another worker, epoch or key fingerprint answered")
        self.live = True
        self.reason = ""
        if self._following is not None:
            self._following.link_up(self._worker, self._expected.epoch, self._ask)
        self._on_change()

    async def _messages(self) -> AsyncIterator[pb.RouterMessage]:
        """What goes down the session, hello first. Belongs to one session: an old one's queue is not read again."""
        outgoing: asyncio.Queue[pb.RouterMessage] = asyncio.Queue()
        self._outgoing = outgoing
        expected = self._expected
        hello = pb.RouterHello(router=self._router, key_fingerprint=expected.key_fingerprint, epoch=expected.epoch)
        yield pb.RouterMessage(hello=hello)
        while True:
            yield await outgoing.get()

    def _take(self, message: pb.WorkerMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "step":
            for output in message.step.sequences:
                self._deliver(output)
        elif kind == "load":
            self.load = worker_load(message.load)
            self.num_loads += 1
            self._on_change()
        elif kind == "events" and self._following is not None:
            self._following.take_feed(self._worker, self._expected.epoch, message.events.batches)
        elif kind == "snapshot" and self._following is not None:
            self._following.take_snapshot(self._worker, self._expected.epoch, snapshot_part(message.snapshot))

    def _ask(self, request: FeedRequest) -> None:
        self._outgoing.put_nowait(feed_message(request))

    def _deliver(self, output: pb.SequenceOutput) -> None:
        stream = self._streams.get(output.sequence)
        if stream is None:
            return
        if output.finish != pb.FINISH_NONE:
            del self._streams[output.sequence]
        stream._put(link_output(output, stream.sequences.index(output.sequence)))

    def _down(self, reason: str) -> None:
        if self.live:
            logger.warning("the link to worker %s broke: %s", self._expected.worker, reason)
        self.reason = reason

    def _lose_all(self) -> None:
        self.live = False
        if self._following is not None:
            self._following.link_down(self._worker, self._ask)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._lose()
        self._on_change()


class _Stranger(Exception):
    """Who answered is not the worker life that was meant."""


def _reason(error: grpc.aio.AioRpcError) -> str:
    if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
        return "refused by the worker: " + (error.details() or "")
    return f"no session: {error.code().name}"
