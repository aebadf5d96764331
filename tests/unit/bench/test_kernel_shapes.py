"""The kernel benchmark's shapes: their data, their check and their floors, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from bench.kernels.__main__ import main
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


def test_torch_and_the_twin_leave_the_same_tokens() -> None:
    row = 3 * torch.randn(1, 400, generator=torch.Generator().manual_seed(1))
    for way in (Way("greedy", temperature=0.0), Way("few", top_k=6, top_p=0.9), Way("min-p", min_p=0.2)):
        logits = row.expand(600, -1).contiguous()
        ours = reference.sample(logits, draws_of(way, 600, logits.device))
        theirs = by_sorting(logits, way, torch.linspace(0, 0.9999, 600)[:, None])
        assert set(ours.tolist()) == set(theirs.tolist())
