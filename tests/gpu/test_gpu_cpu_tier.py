"""The CPU tier behind a CUDA pool: bit-equal copies over page-locked memory, in order with a busy stream."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from worker.batch import Direction, Transfer, TransferEnd
from worker.cpu_tier import CpuTier

NUM_BLOCKS = 64


@pytest.fixture(params=["same", "int8"])
def tier(request: pytest.FixtureRequest) -> Iterator[CpuTier]:
    blocks = torch.randn(NUM_BLOCKS, 8, 2, 4, 16, 128, device="cuda").bfloat16()
    made = CpuTier(blocks, NUM_BLOCKS, cpu_dtype=request.param)
    yield made
    made.close()


def ends(tier: CpuTier, count: int) -> list[TransferEnd]:
    found: list[TransferEnd] = []
    limit = time.monotonic() + 20
    while len(found) < count and time.monotonic() < limit:
        found += tier.take_ended()
    return found


def allowed(tier: CpuTier, before: torch.Tensor) -> float:
    return 0.0 if not tier.error.max_abs else float(before.abs().max()) / 127


def test_page_locked_there_and_back(tier: CpuTier) -> None:
    blocks = tier._device_blocks
    before = blocks.clone()
    assert tier._store.rows.is_pinned()
    tier.start([Transfer(n, Direction.DEMOTE, n, NUM_BLOCKS - 1 - n) for n in range(NUM_BLOCKS)])
    assert all(end.ok for end in ends(tier, NUM_BLOCKS))
    blocks.fill_(torch.nan)
    tier.start([Transfer(100 + n, Direction.PROMOTE, n, n) for n in range(NUM_BLOCKS)])
    assert all(end.ok for end in ends(tier, NUM_BLOCKS))
    assert float((blocks.flip(0) - before).abs().max()) <= allowed(tier, before)


def test_copies_are_in_order_with_the_steps(tier: CpuTier) -> None:
    blocks = tier._device_blocks
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(30):  # a step that is still running when the demotion is ordered
        a = (a @ a).clamp_(-1, 1)
    blocks[3] = 5.0
    tier.start([Transfer(1, Direction.DEMOTE, 3, 0)])
    tier.before_writes([3])
    blocks[3] = torch.nan
    assert ends(tier, 1)[0].ok
    tier.start([Transfer(2, Direction.PROMOTE, 0, 9)])
    assert ends(tier, 1)[0].ok
    assert bool((blocks[9] == 5.0).all())


def test_a_changed_payload_is_not_used(tier: CpuTier) -> None:
    tier.start([Transfer(1, Direction.DEMOTE, 3, 0)])
    assert ends(tier, 1)[0].ok
    tier._store.rows[0, 77] ^= 1
    before = tier._device_blocks.clone()
    tier.start([Transfer(2, Direction.PROMOTE, 0, 9)])
    assert not ends(tier, 1)[0].ok
    assert torch.equal(tier._device_blocks, before)
