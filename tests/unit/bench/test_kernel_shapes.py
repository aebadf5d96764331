"""The kernel benchmark's shapes: their data, their check and their floors, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from bench.kernels.__main__ import held_against, main
from bench.kernels.sampling import Way, by_sorting, draws_of
from bench.kernels.shapes import SHAPES, Shape, make_setting
from kernels import reference
from kernels.configs import DecodeConfig, Tuning, WideConfig

TUNED = Tuning(
    DecodeConfig(tile=32, shortest=32),
    *[WideConfig(64, 32, 4, 1, 64)] * 2,
    share=True,
)


@pytest.mark.parametrize(
    "shape",
    [
        Shape("decode", (1,) * 4, (90,) * 4, 1.0, shared=64, groups=2, heads=(4, 2, 16)),
        Shape("mixed", (20, 1), (70, 33), 1.0, heads=(4, 2, 16)),
        Shape("fp8", (1,) * 2, (50, 33), 1.0, heads=(4, 2, 16), kept="fp8"),
        Shape("int8", (1,) * 2, (50, 33), 1.0, heads=(4, 2, 16), kept="int8"),
    ],
    ids=lambda shape: shape.name,
)
def test_a_result_is_checked(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.kernels.shapes.MOST_LAYERS", 2)
    setting = make_setting(shape, "cpu", torch.float16)
    out = setting.run(setting.plan(TUNED), 1)
    assert setting.error(out, 1) < 2e-3
    assert setting.error(setting.run(setting.plan(TUNED), 0), 1) > 0.1
    out[-1, -1] = torch.nan
    assert setting.error(out, 1) == float("inf")


def test_shared_keys_are_counted_once() -> None:
    shape = Shape("shared", (1,) * 6, (100,) * 6, 1.0, shared=80, groups=2)
    assert shape.distinct_keys == 2 * 80 + 6 * 20
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)


def test_fewer_bits_are_fewer_bytes() -> None:
    by_name = {shape.name: shape for shape in SHAPES}
    plain, kept = by_name["D4"], by_name["D4q8"]
    queries = 64 * 32 * 128 * 4
    assert plain.bytes - queries == 64 * 4096 * 8 * 2 * 128 * 2
    assert kept.bytes - queries == 64 * 4096 * 8 * 2 * (128 + 2)
    assert kept.operations == plain.operations


def test_all_of_a_cache_in_fewer_bits_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.kernels.shapes.MOST_LAYERS", 2)
    monkeypatch.setattr("bench.kernels.shapes.BLOCKS_AT_ONCE", 2)
    setting = make_setting(Shape("int4", (1,) * 3, (40,) * 3, 1.0, heads=(4, 2, 16), kept="int4"), "cpu", torch.float32)
    read = torch.stack([setting.dense(layer, sequence) for layer in range(2) for sequence in range(3)])
    assert read.isfinite().all() and 0.8 < float(read.std()) < 1.2
    assert read.flatten(2).std(-1).min() > 0.5


def test_a_shape_is_held_against_another_where_both_were_timed() -> None:
    figures = [{"name": "D4", "us": 255.0}, {"name": "D4q8", "us": 150.0}, {"name": "D1", "us": 8.0}]
    assert held_against(figures) == ["D4q8: 1.70 x as fast as D4, goal 1.7 x"]
    assert held_against(figures[1:]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 1
    assert "CUDA" in capsys.readouterr().err


def test_torch_and_the_twin_leave_the_same_tokens() -> None:
    row = 3 * torch.randn(1, 400, generator=torch.Generator().manual_seed(1))
    for way in (Way("greedy", temperature=0.0), Way("few", top_k=6, top_p=0.9), Way("min-p", min_p=0.2)):
        logits = row.expand(600, -1).contiguous()
        ours = reference.sample(logits, draws_of(way, 600, logits.device))
        theirs = by_sorting(logits, way, torch.linspace(0, 0.9999, 600)[:, None])
        assert set(ours.tolist()) == set(theirs.tolist())
