"""The CPU tier's copies: bit-equal or dropped, in order with the steps, measured, wiped; int8 with its error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pando.errors import ConfigError
from worker.batch import Direction, Transfer, TransferEnd
from worker.cpu_blocks import CpuBlocks, Int8Format
from worker.cpu_tier import CpuTier

SHAPE = (12, 3, 2, 2, 8, 16)  # 12 device blocks of 3 layers, 2 key-value heads, 8 positions of 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Make = Callable[..., CpuTier]


def normal(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[CpuTier] = []

    def tier(blocks: torch.Tensor, num_blocks: int = 6, **how: Any) -> CpuTier:
        made.append(CpuTier(blocks, num_blocks, **how))
        return made[-1]

    yield tier
    for each in made:
        each.close()


def demote(number: int, source: int, target: int) -> Transfer:
    return Transfer(number, Direction.DEMOTE, source, target)


def promote(number: int, source: int, target: int) -> Transfer:
    return Transfer(number, Direction.PROMOTE, source, target)


def ends(tier: CpuTier, count: int) -> list[TransferEnd]:
    found: list[TransferEnd] = []
    limit = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < limit, f"{len(found)} of {count} transfers ended"
        found += tier.take_ended()
        time.sleep(0.0005)
    return found


def settle(tier: CpuTier) -> None:
    """Until all orders given so far are carried out; a promotion of an empty block is one that changes nothing."""
    tier.start([promote(10**6, tier.num_blocks - 1, 0)])
    assert ends(tier, 1)[-1].number == 10**6


class Gate:
    """Holds the tier's thread before its first checksum until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        real = getattr(CpuBlocks, name)

        def held(*arguments: Any) -> Any:
            self.reached.set()
            assert self.open.wait(20)
            return real(*arguments)

        monkeypatch.setattr(CpuBlocks, name, held)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_is_bit_equal(make: Make, dtype: torch.dtype) -> None:
    blocks = normal(dtype)
    blocks[4, 0, 0, 0, 0, :4] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-7])
    before = blocks.clone()
    tier = make(blocks)
    tier.start([demote(1, 4, 0), demote(2, 9, 5)])
    assert [(end.number, end.ok) for end in ends(tier, 2)] == [(1, True), (2, True)]
    tier.start([promote(3, 0, 2), promote(4, 5, 11)])
    assert [(end.number, end.ok) for end in ends(tier, 2)] == [(3, True), (4, True)]
    assert torch.equal(blocks[2].view(torch.uint8), before[4].view(torch.uint8))
    assert torch.equal(blocks[11], before[9])
    others = [0, 1, 3, 5, 6, 7, 8, 9, 10]
    assert torch.equal(blocks[others], before[others])
    assert tier.error.max_abs == 0


@pytest.mark.parametrize("byte", [0, 1000, -1])
def test_a_changed_payload_is_reported_and_not_used(make: Make, byte: int) -> None:
    blocks = normal()
    tier = make(blocks)
    tier.start([demote(1, 3, 2)])
    ends(tier, 1)
    tier._store.rows[2, byte] ^= 1
    before = blocks.clone()
    tier.start([promote(2, 2, 7)])
    (end,) = ends(tier, 1)
    assert (end.number, end.ok) == (2, False)
    assert torch.equal(blocks, before)


def test_a_block_that_holds_nothing_is_not_promoted(make: Make) -> None:
    blocks = normal()
    before = blocks.clone()
    tier = make(blocks)
    tier.start([promote(1, 0, 7)])
    assert not ends(tier, 1)[0].ok
    assert torch.equal(blocks, before)


def test_wiped_blocks_are_zero_and_hold_nothing(make: Make) -> None:
    blocks = normal()
    tier = make(blocks)
    tier.start([demote(1, 3, 2), demote(2, 4, 3)])
    tier.wipe([2])
    settle(tier)
    assert tier._store.rows[2].count_nonzero() == 0
    assert tier._store.rows[3].count_nonzero() > 0
    tier.start([promote(3, 2, 0), promote(4, 3, 1)])
    assert [end.ok for end in ends(tier, 2)] == [False, True]


def test_close_carries_out_what_it_was_given_and_wipes_all(make: Make) -> None:
    tier = make(normal())
    tier.start([demote(1, 3, 2), demote(2, 4, 3)])
    rows = tier._store.rows
    tier.close()
    assert [end.ok for end in tier.take_ended()] == [True, True]
    assert rows.count_nonzero() == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "cpu-tier"]
    tier.close()


def test_a_step_that_overwrites_a_source_waits_for_its_copy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "begin_write")
    blocks = normal()
    before = blocks.clone()
    tier = make(blocks)
    tier.start([demote(1, 3, 0)])
    assert gate.reached.wait(20)
    wrote = threading.Event()

    def step() -> None:
        tier.before_writes([1, 3])
        blocks[3] = torch.nan
        wrote.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not wrote.wait(0.1)
    gate.open.set()
    thread.join(20)
    assert wrote.is_set()
    tier.start([promote(2, 0, 5)])
    assert [end.ok for end in ends(tier, 2)] == [True, True]
    assert torch.equal(blocks[5], before[3])


def test_steps_on_other_blocks_wait_for_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "begin_write")
    tier = make(normal())
    tier.before_writes([3])
    tier.start([demote(1, 3, 0)])
    assert gate.reached.wait(20)
    tier.before_writes([0, 1, 2, 4])
    assert tier.take_ended() == []
    gate.open.set()
    assert ends(tier, 1)[0].ok


def test_a_promotion_into_a_source_goes_second(make: Make) -> None:
    blocks = normal()
    before = blocks.clone()
    tier = make(blocks)
    tier.start([demote(1, 3, 0)])
    ends(tier, 1)
    tier.start([demote(2, 5, 1), promote(3, 0, 5)])
    assert all(end.ok for end in ends(tier, 2))
    tier.start([promote(4, 1, 6)])
    assert ends(tier, 1)[0].ok
    assert torch.equal(blocks[5], before[3])
    assert torch.equal(blocks[6], before[5])


def test_a_transfer_is_timed_without_its_wait_in_the_queue(make: Make) -> None:
    blocks = torch.zeros(64, *SHAPE[1:])
    tier = make(blocks, 64)
    began = time.perf_counter()
    tier.start([demote(number, number, number) for number in range(64)])
    seconds = [end.seconds for end in ends(tier, 64)]
    assert min(seconds) > 0
    assert sum(seconds) <= time.perf_counter() - began


def test_many_transfers_keep_their_order_and_content(make: Make) -> None:
    blocks = torch.zeros(64, *SHAPE[1:])
    blocks += torch.arange(64.0).view(-1, 1, 1, 1, 1, 1)
    tier = make(blocks, 64)
    tier.start([demote(number, number, 63 - number) for number in range(64)])
    assert [end.number for end in ends(tier, 64)] == list(range(64))
    tier.start([promote(number, number, number) for number in range(64)])
    assert all(end.ok for end in ends(tier, 64))
    assert blocks[:, 0, 0, 0, 0, 0].tolist() == list(range(63, -1, -1))


def test_a_failing_copy_ends_badly_and_the_next_one_works(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = normal()
    tier = make(blocks)
    real, failures = tier._format.encode, iter([True, False])

    def encode(block: torch.Tensor) -> torch.Tensor:
        if next(failures):
            raise torch.OutOfMemoryError("none left")
        return real(block)

    monkeypatch.setattr(tier._format, "encode", encode)
    tier.start([demote(1, 3, 0), demote(2, 4, 1)])
    assert [end.ok for end in ends(tier, 2)] == [False, True]
    tier.start([promote(3, 0, 7)])
    assert not ends(tier, 1)[0].ok


def test_no_memory_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="no memory for 4611686018427387904 KV blocks on the CPU"):
        CpuTier(normal(), 2**62)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_error_is_bounded_and_reported(make: Make, dtype: torch.dtype) -> None:
    blocks = normal(dtype)
    blocks[4] *= torch.logspace(-3, 3, 16).view(1, 1, 1, 16, 1)[:, :, :, :8]  # magnitudes differ by token
    blocks[4, 1, 0, 1, 3] = 0
    source = blocks[4].double()
    tier = make(blocks, cpu_dtype="int8")
    assert tier._store.rows.shape[1] <= 0.32 * blocks[0].nbytes * (4 // dtype.itemsize)
    tier.start([demote(1, 4, 0)])
    ends(tier, 1)
    tier.start([promote(2, 0, 8)])
    assert ends(tier, 1)[0].ok
    wrong = (blocks[8].double() - source).abs()
    scale = source.abs().amax(-1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * source.abs().amax(-1, keepdim=True)
    assert (wrong <= 0.5001 * scale + rounding + 1e-7).all()
    assert blocks[8, 1, 0, 1, 3].count_nonzero() == 0
    assert tier.error.max_abs == pytest.approx(float(wrong.max()), rel=1e-3)
    assert tier.error.max_relative == pytest.approx(float(wrong.norm() / source.norm()), rel=1e-2)
    assert 1e-3 < tier.error.max_relative < 1e-2


def test_int8_rounds_half_to_even_and_clamps() -> None:
    block = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 126.6, 0.0, 0, 0]).view(1, 1, 1, 1, 12)
    made = Int8Format(block)
    assert made.encode(block)[:12].view(torch.int8).tolist() == [127, -127, 0, 2, 2, 0, -2, 0, 127, 0, 0, 0]
    tiny = torch.full((1, 1, 1, 1, 12), 1e-44)  # a magnitude whose scale is no longer an exact quotient
    assert made.encode(tiny)[:12].view(torch.int8).abs().max() <= 127


def test_int8_refuses_what_no_scale_holds(make: Make) -> None:
    blocks = normal()
    blocks[3, 1, 0, 0, 2, 5] = torch.inf
    blocks[4, 1, 0, 0, 2, 5] = torch.nan
    tier = make(blocks, cpu_dtype="int8")
    tier.start([demote(1, 3, 0), demote(2, 4, 1), demote(3, 5, 2)])
    assert [end.ok for end in ends(tier, 3)] == [False, False, True]
    assert tier._store.rows[:2].count_nonzero() == 0
    assert tier.error.max_abs < 0.1


def test_the_thread_waits_without_work(make: Make) -> None:
    tier = make(normal())
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    assert tier.take_ended() == []


def test_a_write_that_nobody_waits_for_any_more_ends_nothing(make: Make) -> None:
    tier = make(normal())
    payload = bytes(normal()[0].nbytes)
    for _ in range(50):
        tier.write(1, payload).cancel()
    assert tier.write(2, payload).result(10)
    assert not tier.write(3, payload[1:]).result(10)
