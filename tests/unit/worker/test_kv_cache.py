"""Sizes: what a block takes, how many fit, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pando.errors import ConfigError
from worker import kv_cache
from worker.models.config import ModelConfig, Rope

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    norm_eps=1e-6,
    max_positions=512,
    rope=Rope(),
    windows=(None,) * 4,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied_head=True,
    dtype="float32",
    eos_token_ids=(2,),
)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_allocated_bytes_are_those_announced(dtype: torch.dtype, size: int) -> None:
    cache = kv_cache.allocate(CONFIG, 10, 16, dtype=dtype, device=CPU)
    assert cache.num_blocks == 10
    assert cache.blocks.nbytes == 10 * kv_cache.bytes_per_block(CONFIG, 16, dtype)
    assert kv_cache.bytes_per_block(CONFIG, 16, dtype) == 4 * 2 * 2 * 16 * 32 * size


def test_layers_are_views_of_one_block_major_allocation() -> None:
    cache = kv_cache.allocate(CONFIG, 3, 8, dtype=torch.float32, device=CPU)
    assert cache.blocks.is_contiguous()
    for index, layer in enumerate(cache.layers):
        layer.fill_(index)
    assert cache.blocks[2, :, 1, 0, 5, 7].tolist() == [0, 1, 2, 3]


def test_a_host_pool_stays_modest() -> None:
    fits = kv_cache.blocks_that_fit(1024, CPU, memory_fraction=0.9, activation_bytes=0)
    assert 0 < fits <= kv_cache.LARGEST_HOST_POOL // 1024
    with pytest.raises(ConfigError, match="no free memory on cpu"):
        kv_cache.blocks_that_fit(1 << 60, CPU, memory_fraction=0.9, activation_bytes=0)


def test_impossible_allocation_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="no memory for 1000000000 KV blocks"):
        kv_cache.allocate(replace(CONFIG, head_dim=4096), 10**9, 16, dtype=torch.float32, device=CPU)


def files(folder: Path, available_kb: int, limit: str, used: int) -> dict[str, Path]:
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {available_kb} kB\n")
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    return {"meminfo": folder / "meminfo", "cgroup": folder}


@pytest.mark.parametrize(
    ("limit", "used", "expected"), [("max", 5, 8_192_000), ("3000000", 1_000_000, 2_000_000), ("1000", 5000, 0)]
)
def test_a_container_limit_counts(tmp_path: Path, limit: str, used: int, expected: int) -> None:
    assert kv_cache.available_host_bytes(**files(tmp_path, 8000, limit, used)) == expected


def test_without_proc_the_machine_is_asked(tmp_path: Path) -> None:
    assert kv_cache.available_host_bytes(tmp_path / "none", tmp_path / "none") > 0
