"""The kernel benchmark's shapes: their data, their check and their floors, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from bench.kernels.__main__ import main
from bench.kernels.shapes import SHAPES, Shape, make_setting
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
    ],
    ids=str,
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 1
    assert "CUDA" in capsys.readouterr().err
