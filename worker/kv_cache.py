"""The tensor that holds the device tier's KV, and how many blocks of it there is room for.

Knows bytes; which block holds what is kvstore's. Invariant: one allocation, block-major, all layers of a block
together, as `kernels` lays it out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pando.errors import ConfigError
from worker.models.config import ModelConfig

# On a host without a device the pool must leave room for the machine's other work, several workers among it.
LARGEST_HOST_POOL = 2 * 1024**3
HOST_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class KVCache:
    """`blocks[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` and one view of it for each layer."""

    blocks: torch.Tensor
    layers: tuple[torch.Tensor, ...]

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[0]


def allocate(
    config: ModelConfig, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """A cache with undefined content: no operation reads what was not written. Host pages are taken when first used."""
    shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
    try:
        blocks = torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise ConfigError(f"no memory for {num_blocks} KV blocks on {device.type}") from error
    return KVCache(blocks, tuple(blocks[:, layer] for layer in range(config.num_layers)))


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Size of one block, all layers."""
    return config.num_layers * 2 * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize


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
