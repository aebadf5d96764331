"""A CPU tier without a device: token ids of blocks in an array, time from the clock.

Knows only the simulated runner's blocks. Copies are made as late as they may be, when they are said to have ended, so
that a store which lets go of a block too early shows as other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from worker.batch import Direction, Transfer, TransferEnd

NEVER_WRITTEN = 0xFFFFFFFF


class SimulatedMover:
    """Implements `BlockMover`: one block after the other, `block_s` each. A payload is the block's token ids, and zeros
    up to `payload_bytes`."""

    def __init__(
        self,
        device_blocks: npt.NDArray[np.uint32],
        num_blocks: int,
        *,
        block_s: float,
        payload_bytes: int = 0,
        clock: Callable[[], float],
    ) -> None:
        self.num_blocks = num_blocks
        self.payload_format = f"simulated {device_blocks.shape[1]}" + (f" {payload_bytes}" if payload_bytes else "")
        # [num_blocks, block_size]
        self.blocks = np.full((num_blocks, device_blocks.shape[1]), NEVER_WRITTEN, np.uint32)
        self._device_blocks = device_blocks
        self._checksums = [0] * num_blocks
        self._block_s = block_s
        self._padding = bytes(max(0, payload_bytes - self.blocks[0].nbytes))
        self._clock = clock
        self._moving: list[tuple[float, Transfer]] = []

    @property
    def largest_error(self) -> float:
        """Token ids come back as they were."""
        return 0.0

    def wipe(self, block_ids: Sequence[int]) -> None:
        """Overwrite these blocks."""
        self.blocks[list(block_ids)] = NEVER_WRITTEN

    def read(self, block_id: int) -> bytes | None:
        """The token ids in a block, None if they are not those that were demoted."""
        intact = self._checksums[block_id] == self._checksum(block_id)
        return self.blocks[block_id].tobytes() + self._padding if intact else None

    def write(self, block_id: int, payload: bytes) -> Future[bool]:
        """Fill a block at once."""
        done: Future[bool] = Future()
        size = self.blocks[block_id].nbytes
        fits = len(payload) == size + len(self._padding) and payload.endswith(self._padding)
        if fits:
            self.blocks[block_id] = np.frombuffer(payload, np.uint32, count=size // 4)
            self._checksums[block_id] = self._checksum(block_id)
        done.set_result(fits)
        return done

    def start(self, transfers: Sequence[Transfer]) -> None:
        """Put these behind what is on its way."""
        for transfer in transfers:
            before = self._moving[-1][0] if self._moving else 0.0
            self._moving.append((max(before, self._clock()) + self._block_s, transfer))

    def take_ended(self) -> list[TransferEnd]:
        """Copy what is due, and say so."""
        now = self._clock()
        due = [transfer for at, transfer in self._moving if at <= now]
        del self._moving[: len(due)]
        return [TransferEnd(transfer.number, self._copy(transfer), self._block_s) for transfer in due]

    def _copy(self, transfer: Transfer) -> bool:
        if transfer.direction is Direction.DEMOTE:
            self.blocks[transfer.target] = self._device_blocks[transfer.source]
            self._checksums[transfer.target] = self._checksum(transfer.target)
            return True
        self._device_blocks[transfer.target] = self.blocks[transfer.source]
        return self._checksums[transfer.source] == self._checksum(transfer.source)

    def _checksum(self, block: int) -> int:
        return xxh3_64_intdigest(self.blocks[block].tobytes())
