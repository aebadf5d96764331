"""Both ends of `FetchBlocks`: KV of a prompt's head from a worker that has it, in parts, with checksums and a deadline.

Knows the wire, the mover's payloads, and the engine as a thread to call into. Invariant: whatever goes wrong, a request
that waits for blocks goes to the engine once, and what did not come is computed. A head is fetched once at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import grpc
import xxhash

from kvstore.block import BlockId
from kvstore.exchange import Export, Import
from kvstore.scope import Region
from pando.errors import InvalidRequest
from pando.worker.v1 import worker_pb2 as pb
from pando.worker.v1 import worker_pb2_grpc
from worker.engine import Engine
from worker.engine_work import EngineStopped
from worker.link_messages import PullOrder, export_order, regions_message
from worker.offload import Offload
from worker.sequence import SequenceRequest

logger = logging.getLogger(__name__)

PART_BYTES = 1024 * 1024
MAX_PAYLOAD_BYTES = 1024 * 1024 * 1024
POLL_S = 0.002
MOST_READ = 16
"""Blocks read in one go, of a part at most, and blocks on their way into memory: a turn of the loop costs about as much
as a small block."""

_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 2 * PART_BYTES),)

T = TypeVar("T")

_Head = tuple[str, int, tuple[Region, ...], bytes]
"""Who is asked, and for what: address, epoch, scopes, tokens."""


class PeerRefused(Exception):
    """The other end cannot give blocks, or sent what cannot be used. The text is fixed."""


class PeerLacks(PeerRefused):
    """None of what was asked for is there."""


@dataclass(slots=True)
class _Waiting:
    """A request whose blocks are on their way: of the sequences that still wait."""

    request: SequenceRequest
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Coming:
    """Blocks of a request on their way in: those of `writes` are in memory when these are done."""

    request: SequenceRequest
    blocks: Import
    writes: list[asyncio.Future[bool]] = field(default_factory=list)
    lacks: bool = False

    @property
    def num_written(self) -> int:
        done = (write.done() and not write.cancelled() and write.result() for write in self.writes)
        return next((at for at, ok in enumerate(done) if not ok), len(self.writes))


class BlockPeers:
    """One worker's exchange of blocks with others, over the CPU tier of each. For the loop of the link's server."""

    def __init__(self, engine: Engine, offload: Offload, *, epoch: int, key_fingerprint: str, token: str) -> None:
        self._engine = engine
        self._offload = offload
        self._epoch = epoch
        self._fingerprint = key_fingerprint
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._heads: dict[_Head, asyncio.Task[None]] = {}

    # In

    def submit(self, request: SequenceRequest, order: PullOrder) -> None:
        """Give a request to the engine when the blocks have come, or the order's time is over."""
        num_tokens = order.num_blocks * self._offload.tiers.device.block_size
        head = (order.address, order.epoch, request.regions, request.token_ids[:num_tokens].tobytes())
        first, waiting = self._heads.get(head), _Waiting(request)
        task = waiting.task = asyncio.create_task(
            self._pull_and_submit(waiting, order) if first is None else self._wait_and_submit(waiting, order, first)
        )
        if first is None:
            self._heads[head] = task
            task.add_done_callback(lambda _: self._heads.pop(head))
        for engine_id in _ids(request):
            self._waiting[engine_id] = waiting

    def hurry(self, engine_id: int) -> None:
        """This sequence waits no more: it goes to the engine now, alone. The others of its request wait on."""
        waiting = self._waiting.get(engine_id)
        if waiting is None:
            return
        if len(_ids(waiting.request)) == 1:
            self._hurry(waiting)
        else:
            del self._waiting[engine_id]
            alone, waiting.request = waiting.request.parted(engine_id)
            self._engine.submit(alone)

    def hurry_all(self) -> None:
        """Nothing that is on its way is wanted any more."""
        while self._waiting:
            self._hurry(next(iter(self._waiting.values())))

    def _hurry(self, waiting: _Waiting) -> None:
        self._leave(waiting.request)
        if waiting.task is not None:
            waiting.task.cancel()
        self._engine.submit(waiting.request)

    async def stop(self) -> None:
        """End what waits, and the connections."""
        tasks = {waiting.task for waiting in self._waiting.values() if waiting.task is not None}
        self._waiting.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()

    async def _pull_and_submit(self, waiting: _Waiting, order: PullOrder) -> None:
        began, request = self._engine.clock(), waiting.request
        size = self._offload.tiers.device.block_size
        most = min(order.num_blocks, _full_blocks(request, size))
        coming = _Coming(request, Import(request.regions, request.token_ids, most))
        try:
            await self._pull(coming, order)
        except EngineStopped:
            pass
        except Exception:  # the request goes on, whatever a peer sends
            logger.exception("a pull of blocks failed")
        first = coming.blocks.first
        waiting.request = replace(
            waiting.request,
            pulled=range(first * size, (first + coming.num_written) * size),
            pull_s=self._engine.clock() - began if coming.blocks.contents else 0.0,
            peer_lacks=coming.lacks,
        )
        self._submit(waiting.request)

    async def _wait_and_submit(self, waiting: _Waiting, order: PullOrder, first: asyncio.Task[None]) -> None:
        """Another request has the same head fetched: what comes is found, what does not is computed."""
        await asyncio.wait({first}, timeout=order.timeout_s)
        self._submit(waiting.request)

    def _submit(self, request: SequenceRequest) -> None:
        if request.sequence_id in self._waiting:
            self._leave(request)
            self._engine.submit(request)

    async def _pull(self, coming: _Coming, order: PullOrder) -> None:
        """Bring what comes in time to where it is found."""
        blocks, mover = coming.blocks, self._offload.mover
        try:
            await self._call(lambda: self._begin_import(coming.request, blocks))
            if blocks.rows:
                async with asyncio.timeout(order.timeout_s), aclosing(self._payloads(blocks, order)) as payloads:
                    async for payload in payloads:
                        writes = coming.writes
                        writes.append(asyncio.wrap_future(mover.write(blocks.rows[len(writes)], payload)))
                        if len(writes) >= MOST_READ:
                            await _done(writes[-MOST_READ])
                    for write in coming.writes:
                        await _done(write)
        except (TimeoutError, grpc.RpcError, PeerRefused) as error:
            coming.lacks = isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.NOT_FOUND
            said = coming.num_written, len(blocks.rows), order.address, _cause(error)
            logger.info("%d of %d blocks came from %s: %s", *said)
        finally:
            num_written = coming.num_written
            self._engine.call(lambda: self._end_import(blocks, num_written))

    def _begin_import(self, request: SequenceRequest, arriving: Import) -> None:
        self._engine.admit(request)
        self._offload.begin_import(arriving)

    def _end_import(self, arriving: Import, written: int) -> None:
        self._offload.exchange.arrived(arriving, written)
        self._offload.exchange.end_import(arriving)

    async def _payloads(self, arriving: Import, order: PullOrder) -> AsyncGenerator[bytes, None]:
        """The blocks in order, each whole and with its checksum."""
        stub = worker_pb2_grpc.WorkerLinkStub(self._channel(order.address))
        call = stub.FetchBlocks(
            pb.FetchBlocksRequest(
                epoch=order.epoch,
                key_fingerprint=self._fingerprint,
                payload_format=self._offload.mover.payload_format,
                regions=regions_message(arriving.regions),
                token_ids=arriving.token_ids,
                first=arriving.first,
                count=len(arriving.rows),
            ),
            metadata=self._metadata,
            timeout=order.timeout_s,
        )
        try:
            parts: list[bytes] = []
            index = arriving.first
            async for chunk in call:
                parts.append(chunk.payload)
                if chunk.index != index or sum(map(len, parts)) > MAX_PAYLOAD_BYTES:
                    raise PeerRefused("blocks out of order or without end")
                if not chunk.HasField("checksum"):
                    continue
                payload = b"".join(parts)
                if xxhash.xxh3_64_intdigest(payload) != chunk.checksum or index == arriving.first + len(arriving.rows):
                    raise PeerRefused("a payload that is not the one that was sent")
                yield payload
                parts.clear()
                index += 1
        finally:
            call.cancel()

    def _leave(self, request: SequenceRequest) -> None:
        for engine_id in _ids(request):
            self._waiting.pop(engine_id, None)

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        return channel

    # Out

    async def chunks(self, request: pb.FetchBlocksRequest, vocab_size: int) -> AsyncGenerator[pb.BlockChunk, None]:
        """What this worker has of what is asked for. Raises `PeerRefused`, and `EngineStopped` at the end. How long it
        may take is for who reads it to say: a time limit of its own would end in the reader's task."""
        export = self._checked(request, vocab_size)
        exchange = self._offload.exchange
        sent = 0
        try:
            await self._call(lambda: exchange.begin_export(export))
            if not export.num_found:
                raise PeerLacks("nothing of it is here")
            while sent < len(export.rows) or not export.ready:
                while sent < len(export.rows):
                    payloads = await asyncio.to_thread(self._read, export.rows[sent : sent + MOST_READ])
                    if not payloads or exchange.is_void(export):
                        return
                    for payload in payloads:
                        for chunk in _parts(export.first + sent, payload):
                            yield chunk
                        sent += 1
                if not export.ready:
                    await asyncio.sleep(POLL_S)
                    await self._call(lambda: exchange.advance(export))
        finally:
            self._engine.call(lambda: exchange.end_export(export))

    def _read(self, rows: list[BlockId]) -> list[bytes]:
        """Payloads of the first of these rows, up to one that is damaged or of a part together."""
        payloads: list[bytes] = []
        num_bytes = 0
        for row in rows:
            payload = self._offload.mover.read(row)
            if payload is None:
                break
            payloads.append(payload)
            num_bytes += len(payload)
            if num_bytes >= PART_BYTES:
                break
        return payloads

    def _checked(self, request: pb.FetchBlocksRequest, vocab_size: int) -> Export:
        if request.epoch != self._epoch:
            raise PeerRefused("another epoch of this worker")
        if request.key_fingerprint != self._fingerprint:
            raise PeerRefused("another key fingerprint")
        if request.payload_format != self._offload.mover.payload_format:
            raise PeerRefused("another payload format")
        try:
            return export_order(request, vocab_size)
        except InvalidRequest as error:
            raise PeerRefused("the request makes no sense") from error

    async def _call(self, work: Callable[[], T]) -> T:
        """On the engine's thread, between two steps."""
        return await asyncio.wrap_future(self._engine.call(work))


def _parts(index: int, payload: bytes) -> list[pb.BlockChunk]:
    parts = [
        pb.BlockChunk(index=index, payload=payload[at : at + PART_BYTES]) for at in range(0, len(payload), PART_BYTES)
    ]
    parts[-1].checksum = xxhash.xxh3_64_intdigest(payload)
    return parts


async def _done(write: asyncio.Future[bool]) -> None:
    """Wait for a write, and leave it be if the wait ends."""
    if not await asyncio.shield(write):
        raise PeerRefused("a payload of another size")


def _full_blocks(request: SequenceRequest, size: int) -> int:
    """Of a prompt whose last token is computed whatever comes."""
    return (len(request.token_ids) - 1) // size


def _ids(request: SequenceRequest) -> list[int]:
    return [request.sequence_id, *(fork.sequence_id for fork in request.forks)]


def _cause(error: Any) -> str:
    if isinstance(error, grpc.RpcError):
        return str(error.code().name)
    return str(error) or type(error).__name__
