"""KV kept in another format than it is computed in: in fewer bits with scales, or in another floating-point type.

Knows tensors only; this is also the plain-torch twin of `kernels.jit.stored`. Invariant: a vector's values and its
scale lie in the same block, so whoever moves, checks or wipes a block's bytes has both; a vector that holds anything
but finite numbers has a scale of NaN, one of zeros comes back as zeros.

A head row, one head's tokens of a block, is `row_bytes` long: all vectors, then all scales (bfloat16), if any:

    [ block_size * vector_bytes | block_size * 2 ]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How a vector of `head_dim` values is stored.

    With `largest`, value x of a vector with largest magnitude m is kept as x / s, rounded to the nearest (half to
    even) and clamped to +-largest, with s = m / largest rounded to bfloat16. Without, it is x rounded to `dtype` and
    clamped to its finite numbers.
    """

    name: str
    dtype: torch.dtype  # of a stored value; two int4, each plus 8, share a byte
    bits: int
    largest: float = 0.0

    @property
    def scale_bytes(self) -> int:
        return SCALE_DTYPE.itemsize if self.largest else 0

    def vector_bytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8

    def row_bytes(self, block_size: int, head_dim: int) -> int:
        """Bytes of a head row."""
        return block_size * (self.vector_bytes(head_dim) + self.scale_bytes)

    def encode(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`vectors[n, head_dim]` as bytes `[n, vector_bytes]`, and their scales as bytes `[n, scale_bytes]`."""
        if not self.largest:
            most = torch.finfo(self.dtype).max
            values = vectors.float().clamp(-most, most).to(self.dtype)
            return values.view(torch.uint8), values.view(torch.uint8)[:, :0]
        wide = vectors.float()
        # Nothing but a finite number times zero is zero.
        most_of = wide.abs().amax(-1, keepdim=True) + (wide * 0).sum(-1, keepdim=True)
        scales = (most_of * (1 / self.largest)).to(SCALE_DTYPE)
        divisor = scales.float()
        steps = wide / torch.where(divisor > 0, divisor, 1.0)
        return self._rounded(steps.nan_to_num_(0.0)), scales.view(torch.uint8)

    def _rounded(self, steps: torch.Tensor) -> torch.Tensor:
        if self.name == "fp8":
            return steps.clamp_(-self.largest, self.largest).to(torch.float8_e4m3fn).view(torch.uint8)
        whole = steps.round_().clamp_(-self.largest, self.largest).to(torch.int8)
        if self.name == "int8":
            return whole.view(torch.uint8)
        # The first half of a vector is in the lower four bits.
        low, high = (whole + 8).view(torch.uint8).chunk(2, dim=-1)
        return low | (high << 4)

    def decode(self, values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """Write into `out[n, block_size, head_dim]` what the bytes `values[n, block_size, vector_bytes]` and
        `scales[n, block_size, scale_bytes]` say."""
        if not self.largest:
            out.copy_(values.view(self.dtype))
            return
        factors = scales.view(SCALE_DTYPE)
        if self.name == "int8":
            out.copy_(values.view(torch.int8))
        elif self.name == "fp8":
            # As torch's own conversion, at a tenth of its time: the same bits are a float16 of 1/256 of the value.
            bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
            out.copy_(bits.view(torch.float16))
            factors = factors.float() * 256
        else:
            half = values.shape[-1]
            four = torch.empty(out.shape, dtype=torch.uint8, device=out.device)
            torch.bitwise_and(values, 15, out=four[..., :half])
            torch.bitwise_right_shift(values, 4, out=four[..., half:])
            out.copy_(four).sub_(8)
        out.mul_(factors)


FORMATS = {
    made.name: made
    for made in (
        KVFormat("float32", torch.float32, 32),
        KVFormat("bfloat16", torch.bfloat16, 16),
        KVFormat("float16", torch.float16, 16),
        KVFormat("int8", torch.int8, 8, largest=127.0),
        KVFormat("fp8", torch.float8_e4m3fn, 8, largest=448.0),
        KVFormat("int4", torch.uint8, 4, largest=7.0),
    )
}


@dataclass(frozen=True, slots=True)
class StoredKV:
    """A cache, or a layer of one, in `format`: to be passed where `kernels` takes such a tensor.

    `rows` is uint8 `[num_blocks, num_layers, 2, num_kv_heads, row_bytes]`, of a layer the same without num_layers.
    `shape` and `dtype` are those of the tensor it stands for: `dtype` is what attention is computed in.
    """

    rows: torch.Tensor
    format: KVFormat
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape[:-1], self.block_size, self.head_dim)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def is_cuda(self) -> bool:
        return self.rows.is_cuda

    def layer(self, index: int) -> StoredKV:
        return StoredKV(self.rows[:, index], self.format, self.block_size, self.head_dim, self.dtype)

    @property
    def values(self) -> torch.Tensor:
        """A view of the vectors in the format's dtype, `[..., block_size, head_dim]`, of int4 half as wide."""
        return self._vectors(self.rows).view(self.format.dtype)

    @property
    def scales(self) -> torch.Tensor:
        """A view of the scales, `[..., block_size]`; of a format without any, an empty one."""
        if not self.format.largest:
            return self.rows[..., :0]
        return self._scales(self.rows).view(SCALE_DTYPE).squeeze(-1)

    def write(self, vectors: torch.Tensor, slot_rows: torch.Tensor) -> None:
        """Store `vectors[n, head_dim]` in these slot rows of a layer, as `kernels.plan` counts them."""
        rows = self._head_rows()
        places = (slot_rows // self.block_size, slot_rows % self.block_size)
        values, scales = self.format.encode(vectors)
        self._vectors(rows).index_put_(places, values)
        if self.format.largest:
            self._scales(rows).index_put_(places, scales)

    def gather(self, head_rows: torch.Tensor, out: torch.Tensor) -> None:
        """Read these head rows of a layer into `out[n, block_size * head_dim]`."""
        rows = self._head_rows().index_select(0, head_rows)
        dense = out.view(-1, self.block_size, self.head_dim)
        self.format.decode(self._vectors(rows), self._scales(rows), dense)

    def _vectors(self, rows: torch.Tensor) -> torch.Tensor:
        size = self.format.vector_bytes(self.head_dim)
        return _split(rows[..., : self.block_size * size], self.block_size, size)

    def _scales(self, rows: torch.Tensor) -> torch.Tensor:
        first = self.block_size * self.format.vector_bytes(self.head_dim)
        return _split(rows[..., first:], self.block_size, self.format.scale_bytes)

    def _head_rows(self) -> torch.Tensor:
        """All head rows from this layer's first one on, `[n, row_bytes]`: a view."""
        layer, size = self.rows, self.rows.shape[-1]
        bytes_ = (layer.shape[0] - 1) * layer.stride(0) + layer[0].numel()
        return layer.as_strided((bytes_ // size, size), (size, 1), layer.storage_offset())


def _split(rows: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """The last dimension as `[count, size]`: a view, whatever the strides."""
    return rows.as_strided((*rows.shape[:-1], count, size), (*rows.stride()[:-1], size, 1), rows.storage_offset())


KV = torch.Tensor | StoredKV


def stored(
    shape: tuple[int, int, int, int, int, int], kv_format: KVFormat, dtype: torch.dtype, device: torch.device | str
) -> StoredKV:
    """A cache with undefined content; `shape` is `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`.
    Raises ValueError where vectors have no whole number of 16-bit words: scales lie on those."""
    block_size, head_dim = shape[4:]
    if head_dim * kv_format.bits % 16:
        raise ValueError(f"heads of {head_dim} cannot be kept in {kv_format.name}")
    size = (*shape[:4], kv_format.row_bytes(block_size, head_dim))
    return StoredKV(torch.empty(size, dtype=torch.uint8, device=device), kv_format, block_size, head_dim, dtype)
