"""The checked-in table of kernel configurations, and what a processor does in a microsecond: chosen by measurement.

Knows sizes only. Invariant: a configuration changes how fast a result is there, and its rounding; nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Keys a step of the loop takes, the fewest keys worth a program of their own, and for how many of its programs a
    multiprocessor has room."""

    tile: int = 64
    num_warps: int = 4
    num_stages: int = 3
    shortest: int = 64
    resident: int = 3


@dataclass(frozen=True, slots=True)
class WideConfig:
    """Query rows of a program, keys a step of its loop takes, and the fewest keys worth a program of their own."""

    rows: int = 64
    tile: int = 64
    num_warps: int = 4
    num_stages: int = 3
    shortest: int = 256


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """One tile of a product, whatever its rows are: see `kernels.jit.linear`. Not measured yet."""

    rows: int = 64
    outputs: int = 64
    inputs: int = 64
    num_warps: int = 4
    num_stages: int = 4


PRODUCT = ProductConfig()


@dataclass(frozen=True, slots=True)
class Processor:
    """What decides whether a shared prefix is read once or by each of its queries, and how ranges are cut."""

    multiprocessors: int = 132
    memory_bytes: float = 2.9e6  # read in a microsecond
    cache_bytes: float = 5.5e6  # read in a microsecond where they fit `cache_size`
    cache_size: int = 30 << 20
    operations: float = 2.5e8  # of matrix products in a microsecond, as attention reaches
    alone_keys: float = 27.0  # that a program of 64 rows takes in a microsecond, alone on a multiprocessor,
    paired_keys: float = 35.0  # and each of two
    decode_keys: float = 60.0  # that all decode programs of a multiprocessor take
    launch: float = 12.0  # microseconds that sharing costs a layer at least: two launches more, and waiting for both


@dataclass(frozen=True, slots=True)
class Tuning:
    decode: DecodeConfig = DecodeConfig()
    wide: WideConfig = WideConfig()
    many: WideConfig = WideConfig(rows=128)  # where there is work for twice as many programs; of the same tile
    processor: Processor = Processor()
    share: bool | None = None  # whether shared prefixes are read once; None: where it pays
    part: int = 1024  # positions of a part in deterministic mode, where nothing is shared


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Logits a step of a loop takes, room in the list of the most likely ones, how many are wanted there where no
    filter says, and how the list is searched: logits a step, bounds tried at once. Not measured: the most threads' work
    that spills no register."""

    tile: int = 2048
    room: int = 2048
    guide: int = 512
    step: int = 512
    pivots: int = 8
    num_warps: int = 8
    num_stages: int = 5


def tuning(head_dim: int, itemsize: int, processor: Processor | None = None, *, scaled: bool = False) -> Tuning:
    """The configuration for heads of `head_dim` elements of `itemsize` bytes, as computed; `scaled` where KV is kept in
    fewer bits, for which nothing has been measured: what fits the registers."""
    processor = processor or Processor()
    if itemsize == 4:  # no matrix unit computes it exactly
        small = max(16, 32 * 128 // max(head_dim, 128))
        wide = WideConfig(64, small, 4, 1)
        return Tuning(DecodeConfig(tile=small, num_stages=2), wide, wide, processor)
    if head_dim > 128:
        wide = WideConfig(64, 64, 4, 2)
        return Tuning(DecodeConfig(tile=32), wide, wide, processor)
    if scaled:
        wide = WideConfig(tile=32)
        return Tuning(DecodeConfig(), wide, wide, processor)
    return Tuning(processor=processor)
