"""KV blocks in CPU memory: one row of bytes for a block, its checksum, and the two ways to write a block as bytes.

Knows bytes; which block holds what is kvstore's. Invariant: a row is read back only if its bytes still have the
checksum they were given when they were written, and a wiped row is zero and has none.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from pando.errors import ConfigError

_INT8_MOST = 127
# Its functions have no types.
_CUDA: Any = torch.cuda


class BlockFormat(Protocol):
    """How a device block `[num_layers, 2, num_kv_heads, block_size, head_dim]` is written as one row of bytes."""

    row_bytes: int

    def encode(self, block: torch.Tensor) -> torch.Tensor:
        """The row, uint8 `[row_bytes]` on the block's device; a view of the block where nothing is converted."""
        ...

    def holds(self, row: torch.Tensor) -> bool:
        """Whether an encoded row says what the block said: no scale holds an infinity."""
        ...

    def decode(self, row: torch.Tensor, block: torch.Tensor) -> None:
        """Write what the row, on the block's device or pinned, says into the block."""
        ...


class SameFormat:
    """The block's own bytes."""

    def __init__(self, block: torch.Tensor) -> None:
        self.row_bytes = block.nbytes

    def encode(self, block: torch.Tensor) -> torch.Tensor:
        return block.view(-1).view(torch.uint8)

    def holds(self, row: torch.Tensor) -> bool:
        return True

    def decode(self, row: torch.Tensor, block: torch.Tensor) -> None:
        block.view(-1).view(torch.uint8).copy_(row, non_blocking=True)


class Int8Format:
    """One int8 for each element, and one float32 scale for each token of each head.

    A value x of a head vector with largest magnitude m is stored as round(x / s), half to even, clamped to +-127,
    with s = m / 127: it comes back within s / 2 of x, but for the rounding of the block's own dtype.
    """

    def __init__(self, block: torch.Tensor) -> None:
        self._shape = block.shape
        self._elements = block.numel()
        self.row_bytes = self._elements + 4 * (self._elements // block.shape[-1])

    def encode(self, block: torch.Tensor) -> torch.Tensor:
        scales = block.abs().amax(-1, keepdim=True).float() / _INT8_MOST
        steps = torch.div(block.float(), torch.where(scales > 0, scales, 1.0)).round_().clamp_(-_INT8_MOST, _INT8_MOST)
        row = torch.empty(self.row_bytes, dtype=torch.uint8, device=block.device)
        row[: self._elements].view(torch.int8).copy_(steps.view(-1))
        row[self._elements :].view(torch.float32).copy_(scales.view(-1))
        return row

    def holds(self, row: torch.Tensor) -> bool:
        return bool(row[self._elements :].view(torch.float32).isfinite().all())

    def decode(self, row: torch.Tensor, block: torch.Tensor) -> None:
        row = row.to(block.device, non_blocking=True)
        steps = row[: self._elements].view(torch.int8).view(self._shape)
        scales = row[self._elements :].view(torch.float32).view(*self._shape[:-1], 1)
        block.copy_(steps.float().mul_(scales))


@dataclass(frozen=True, slots=True)
class FormatError:
    """What came back wrong so far, of the blocks that were looked at: the largest difference of an element, and the
    largest of a block as the norm of its differences over its own norm. Zero where blocks keep their own bytes."""

    max_abs: float = 0.0
    max_relative: float = 0.0

    def with_block(self, block: torch.Tensor, returned: torch.Tensor) -> FormatError:
        wrong = (block.float() - returned.float()).flatten()
        norm = float(block.float().norm())
        relative = float(wrong.norm()) / norm if norm > 0 else 0.0
        return FormatError(max(self.max_abs, float(wrong.abs().max())), max(self.max_relative, relative))


def block_format(name: str, block: torch.Tensor) -> BlockFormat:
    """`same` or `int8`, for blocks like this one."""
    return Int8Format(block) if name == "int8" else SameFormat(block)


class CpuBlocks:
    """`rows[num_blocks, row_bytes]` in private anonymous memory that no core dump and no forked child contains;
    page-locked where a CUDA device copies from it. Raises `ConfigError` if there is no memory for it."""

    def __init__(self, num_blocks: int, row_bytes: int, *, pinned: bool) -> None:
        self.num_blocks = num_blocks
        self._pinned = pinned
        try:
            memory = mmap.mmap(-1, num_blocks * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"no memory for {num_blocks} KV blocks on the CPU") from error
        for advice in ("MADV_DONTDUMP", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                memory.madvise(getattr(mmap, advice))
        self._bytes = np.frombuffer(memory, dtype=np.uint8).reshape(num_blocks, row_bytes)
        self.rows = torch.from_numpy(self._bytes)
        self._checksums: list[int | None] = [None] * num_blocks
        if pinned:
            self._pin()

    def sign(self, block: int) -> None:
        """The row is complete: take its checksum."""
        self._checksums[block] = xxhash.xxh3_64_intdigest(self._bytes[block])

    def intact(self, block: int) -> bool:
        """Whether the row was signed and has not changed since."""
        return self._checksums[block] == xxhash.xxh3_64_intdigest(self._bytes[block])

    def begin_write(self, block: int) -> None:
        """The row is about to be written: it is not intact until it is signed again."""
        self._checksums[block] = None

    def payload(self, block: int) -> bytes | None:
        """The bytes of a row, None if it is not intact."""
        return self._bytes[block].tobytes() if self.intact(block) else None

    def put(self, block: int, payload: bytes) -> bool:
        """Write and sign a row; False if these are not the bytes of a row."""
        if len(payload) != self._bytes.shape[1]:
            return False
        self.begin_write(block)
        self._bytes[block] = np.frombuffer(payload, np.uint8)
        self.sign(block)
        return True

    def wipe(self, blocks: Sequence[int]) -> None:
        """Overwrite these rows with zeros, and forget their checksums."""
        for block in blocks:
            self._checksums[block] = None
            self._bytes[block] = 0

    def close(self) -> None:
        """Wipe what holds anything. The rows must not be used after."""
        self.wipe([block for block, checksum in enumerate(self._checksums) if checksum is not None])
        if self._pinned:
            _CUDA.cudart().cudaHostUnregister(self.rows.data_ptr())
            self._pinned = False

    def _pin(self) -> None:
        """torch's own pinned memory comes in powers of two, which would waste up to half of a pool."""
        result = _CUDA.cudart().cudaHostRegister(self.rows.data_ptr(), self.rows.nbytes, 0)
        if int(result) != 0:
            raise ConfigError(f"{self.num_blocks} KV blocks on the CPU cannot be page-locked; use fewer --cpu-blocks")
