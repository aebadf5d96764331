"""The tensor that holds the device tier's KV, and how many blocks of it there is room for.

Knows bytes; which block holds what is kvstore's. Invariant: one allocation, block-major, all layers of a block
together, scales among them, as `kernels` lays it out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from pando.errors import ConfigError
from worker.models.config import ModelConfig

# On a host without a device the pool must leave room for the machine's other work, several workers among it.
LARGEST_HOST_POOL = 2 * 1024**3
HOST_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class KVCache:
    """`blocks`: `[num_blocks, ...]`, all that a block holds under one number, for whoever moves blocks. `whole`: the
    same as the kernels take it, `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, and `layers` the
    views of it for each layer. `payload`: what there is to know of a block's bytes to read them elsewhere."""

    blocks: torch.Tensor
    whole: kernels.KV
    layers: tuple[kernels.KV, ...]
    payload: str

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[0]


def allocate(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: str = "auto",
) -> KVCache:
    """A cache with undefined content: no operation reads what was not written. Host pages are taken when first used.

    Attention is computed in `dtype`; `kv_dtype` says what KV is kept in, `auto` the same.
    """
    shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
    stored_as = kv_format(kv_dtype, dtype)
    try:
        if stored_as is None:
            blocks = torch.empty(shape, dtype=dtype, device=device)
            layers = tuple(blocks[:, layer] for layer in range(config.num_layers))
            return KVCache(blocks, blocks, layers, f"{dtype} {list(shape[1:])}")
        whole = kernels.stored(shape, stored_as, dtype, device)
    except ValueError as error:
        raise ConfigError(f"--kv-dtype {kv_dtype}: {error}") from error
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise ConfigError(f"no memory for {num_blocks} KV blocks on {device.type}") from error
    views = tuple(whole.layer(layer) for layer in range(config.num_layers))
    return KVCache(whole.rows, whole, views, f"{stored_as.name} of {dtype} {list(shape[1:])}")


def kv_format(name: str, dtype: torch.dtype) -> kernels.KVFormat | None:
    """What `--kv-dtype` names; None where KV is kept as it is computed, in `dtype`."""
    if name in ("auto", str(dtype).removeprefix("torch.")):
        return None
    if name not in kernels.FORMATS:
        raise ConfigError(f"--kv-dtype must be auto or one of {', '.join(kernels.FORMATS)}, not {name!r}")
    return kernels.FORMATS[name]


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
    """Size of one block, all layers, scales included."""
    stored_as = kv_format(kv_dtype, dtype)
    size = block_size * config.head_dim * dtype.itemsize
    if stored_as is not None:
        size = stored_as.row_bytes(block_size, config.head_dim)
    return config.num_layers * 2 * config.num_kv_heads * size


def blocks_that_fit(block_bytes: int, device: torch.device, *, memory_fraction: float, activation_bytes: int) -> int:
    """How many blocks free memory holds after the weights are loaded: on a GPU within `memory_fraction` of the whole
    less room for a step, on a host within a modest share. Raises `ConfigError` if not one fits."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = int(total * memory_fraction) - (total - free) - activation_bytes
    else:
        room = min(LARGEST_HOST_POOL, int(available_host_bytes() * HOST_SHARE))
    if room < block_bytes:
        raise ConfigError(f"no free memory on {device.type} for KV blocks; use a smaller model or --device-blocks")
    return room // block_bytes


def available_host_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process can still take: the machine's, or its container's where that is less."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(int(limit) - used, 0))
