"""The CPU tier's copies: device blocks to CPU memory and back, on a thread and streams of their own, beside the steps.

Knows block numbers and bytes. Invariant: a demotion reads its source as the steps executed before it left it, and a
promotion ends well only if what was demoted is in its target, complete and with the checksum of its demotion.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch

from worker.batch import Direction, Transfer, TransferEnd
from worker.cpu_blocks import CpuBlocks, FormatError, block_format

log = logging.getLogger(__name__)

# Its constructors have no types.
_CUDA: Any = torch.cuda

# Transfers that a CUDA device is given before the first of them is waited for.
MOST_ISSUED = 32
# One demotion in this many, the first among them, has its error measured: that costs as much as the conversion.
ERROR_EVERY = 8


@dataclass(slots=True)
class _Flight:
    """One transfer on its way."""

    transfer: Transfer
    after: torch.cuda.Event | None  # steps that were launched before it
    behind: _Flight | None  # the demotion whose source it overwrites
    began: float = 0.0
    done: torch.cuda.Event | None = None
    ok: bool = False
    row: torch.Tensor | None = None  # a converted row, until its copy is done
    issued: threading.Event = field(default_factory=threading.Event)  # the source is read, or `done` says when


@dataclass(frozen=True, slots=True)
class _Write:
    """A row that comes from elsewhere."""

    block: int
    payload: bytes
    done: Future[bool] = field(default_factory=Future)


class CpuTier:
    """`num_blocks` blocks of CPU memory behind `device_blocks`, whose first dimension is the block.

    Everything but the copies themselves is for the runner's thread. `cpu_dtype` `int8` keeps blocks in about half (of
    16 bit) or a quarter (of 32 bit) of the memory, with the error that `error` reports. `payload` says what a block's
    bytes are where dtype and shape do not.
    """

    def __init__(
        self, device_blocks: torch.Tensor, num_blocks: int, *, cpu_dtype: str = "same", payload: str = ""
    ) -> None:
        self.num_blocks = num_blocks
        self.error = FormatError()
        self._device_blocks = device_blocks
        self._device = device_blocks.device
        self._lossy = cpu_dtype == "int8"
        self.payload_format = f"{cpu_dtype} {payload or f'{device_blocks.dtype} {list(device_blocks.shape[1:])}'}"
        self._format = block_format(cpu_dtype, device_blocks[0])
        cuda = self._device.type == "cuda"
        self._store = CpuBlocks(num_blocks, self._format.row_bytes, pinned=cuda)
        self._streams: dict[Direction, torch.cuda.Stream] = {}
        if cuda:
            self._streams = {way: _CUDA.Stream(self._device) for way in Direction}
        self._reading: dict[int, _Flight] = {}  # by device block
        self._last_end = 0.0
        self._demoted = 0
        self._ended: deque[TransferEnd] = deque()
        self._orders: SimpleQueue[_Flight | _Write | list[int] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="cpu-tier", daemon=True)
        self._thread.start()

    @property
    def largest_error(self) -> float:
        """Of a block, relative; see `error`."""
        return self.error.max_relative

    def start(self, transfers: Sequence[Transfer]) -> None:
        """Begin these copies, in order. A DEMOTE reads what the steps launched so far write."""
        after = torch.cuda.current_stream(self._device).record_event() if self._streams else None
        for transfer in transfers:
            promote = transfer.direction is Direction.PROMOTE
            flight = _Flight(transfer, after, self._reading.pop(transfer.target, None) if promote else None)
            if not promote:
                self._reading[transfer.source] = flight
            self._orders.put(flight)

    def wipe(self, block_ids: Sequence[int]) -> None:
        """Overwrite these CPU blocks after the transfers started before, and before those started later."""
        self._orders.put(list(block_ids))

    def read(self, block_id: int) -> bytes | None:
        """The payload of a CPU block that is held, None if it is not intact. From any thread."""
        return self._store.payload(block_id)

    def write(self, block_id: int, payload: bytes) -> Future[bool]:
        """Fill a CPU block that is held, behind the orders given so far. From any thread."""
        order = _Write(block_id, payload)
        self._orders.put(order)
        return order.done

    def take_ended(self) -> list[TransferEnd]:
        """Transfers that ended since the last call, in the order they were started. Never waits."""
        ends: list[TransferEnd] = []
        while self._ended:
            ends.append(self._ended.popleft())
        if ends and self._reading:
            numbers = {end.number for end in ends}
            self._reading = {b: f for b, f in self._reading.items() if f.transfer.number not in numbers}
        return ends

    def before_writes(self, block_ids: Iterable[int]) -> None:
        """A step will write these device blocks: let demotions that still read one of them go first."""
        if not self._reading:
            return
        for block in block_ids:
            flight = self._reading.pop(block, None)
            if flight is not None:
                flight.issued.wait()
                if flight.done is not None:
                    torch.cuda.current_stream(self._device).wait_event(flight.done)

    def close(self) -> None:
        """End the thread after what it was given, and wipe the memory."""
        if self._thread.is_alive():
            self._orders.put(None)
            self._thread.join()
            self._store.close()

    def _serve(self) -> None:
        with torch.inference_mode():
            while self._serve_some():
                pass

    def _serve_some(self) -> bool:
        """Wait for orders and carry them out; a CUDA device gets several copies before the first is waited for."""
        most = MOST_ISSUED if self._streams else 1
        flights: list[_Flight] = []
        order = self._orders.get()
        while order is not None:
            if isinstance(order, _Flight):
                self._begin(order)
                flights.append(order)
            else:
                self._finish(flights)
                flights = []
                if isinstance(order, _Write):
                    if order.done.set_running_or_notify_cancel():
                        order.done.set_result(self._store.put(order.block, order.payload))
                else:
                    self._store.wipe(order)
            if len(flights) == most or self._orders.empty():
                break
            order = self._orders.get()
        self._finish(flights)
        return order is not None

    def _begin(self, flight: _Flight) -> None:
        flight.began = perf_counter()
        demote = flight.transfer.direction is Direction.DEMOTE
        try:
            if self._streams:
                stream = self._streams[flight.transfer.direction]
                with torch.cuda.stream(stream):
                    for event in (flight.after, flight.behind.done if flight.behind is not None else None):
                        if event is not None:
                            stream.wait_event(event)
                    flight.ok = self._demote(flight) if demote else self._promote(flight.transfer)
                    flight.done = stream.record_event(_CUDA.Event(blocking=True))
            else:
                flight.ok = self._demote(flight) if demote else self._promote(flight.transfer)
        except RuntimeError:  # what torch raises, no memory for a conversion among it; the engine goes on without it
            log.exception("a copy between the tiers failed")
        finally:
            flight.issued.set()

    def _demote(self, flight: _Flight) -> bool:
        block, target = self._device_blocks[flight.transfer.source], flight.transfer.target
        self._store.begin_write(target)
        flight.row = self._format.encode(block)
        if not self._format.holds(flight.row):
            return False
        self._store.rows[target].copy_(flight.row, non_blocking=True)
        if self._lossy and self._demoted % ERROR_EVERY == 0:
            returned = torch.empty_like(block)
            self._format.decode(flight.row, returned)
            self.error = self.error.with_block(block, returned)
        self._demoted += 1
        return True

    def _promote(self, transfer: Transfer) -> bool:
        if not self._store.intact(transfer.source):
            return False
        self._format.decode(self._store.rows[transfer.source], self._device_blocks[transfer.target])
        return True

    def _finish(self, flights: Sequence[_Flight]) -> None:
        for flight in flights:
            transfer = flight.transfer
            if flight.done is not None:
                flight.done.synchronize()
            if transfer.direction is Direction.DEMOTE:
                if flight.ok:
                    self._store.sign(transfer.target)
                else:
                    self._store.wipe([transfer.target])
            flight.row = flight.behind = None
            now = perf_counter()
            seconds = now - max(flight.began, self._last_end)
            self._last_end = now
            self._ended.append(TransferEnd(transfer.number, flight.ok, seconds))
