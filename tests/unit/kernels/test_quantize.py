"""How a vector is stored: rounding, clamping, zeros, what is not finite, and where its bytes lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from kernels import FORMATS
from tests.kernel_cases import kept

SCALED = ["int8", "fp8", "int4"]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def scales(vectors: torch.Tensor, name: str) -> torch.Tensor:
    return FORMATS[name].encode(vectors)[1].view(torch.bfloat16).double()


@pytest.mark.parametrize(("name", "steps"), [("int8", 127), ("int4", 7)])
def test_a_whole_number_is_off_by_half_a_step_at_most(name: str, steps: int) -> None:
    vectors = normal(400, 32) * torch.logspace(-20, 20, 400)[:, None]
    scale = scales(vectors, name)
    largest = vectors.abs().amax(-1, keepdim=True).double()
    torch.testing.assert_close(scale, largest / steps, rtol=2.0**-8, atol=0)
    assert ((kept(vectors, FORMATS[name]).double() - vectors.double()).abs() <= scale / 2 * (1 + 1e-6)).all()


def test_fp8_is_off_by_a_sixteenth_or_by_half_of_its_smallest_number() -> None:
    vectors = normal(400, 32) * torch.logspace(-20, 20, 400)[:, None]
    allowed = torch.maximum(vectors.abs().double() / 16, scales(vectors, "fp8") * 2.0**-10)
    assert ((kept(vectors, FORMATS["fp8"]).double() - vectors.double()).abs() <= allowed * (1 + 1e-6)).all()


def test_halves_go_to_the_even_number() -> None:
    vector = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert kept(vector, FORMATS["int8"]).tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    vector = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0]])
    assert kept(vector, FORMATS["int4"]).tolist() == [[7, 0, 2, 2, 0, -2, -2, -7]]
    vector = torch.tensor([[448.0, 17, 19, 21, -17, -19, 2.0**-10, 3 * 2.0**-10]])
    assert kept(vector, FORMATS["fp8"]).tolist() == [[448, 16, 20, 20, -16, -20, 0, 2.0**-8]]


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_come_back(name: str) -> None:
    vectors = normal(3, 16)
    vectors[1] = 0
    assert not kept(vectors, FORMATS[name])[1].any()
    assert kept(vectors, FORMATS[name])[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_does_not_look_like_one(name: str, value: float) -> None:
    vectors = normal(3, 16)
    vectors[1, 5] = value
    back = kept(vectors, FORMATS[name])
    assert back[1].isnan().all()
    assert back[[0, 2]].isfinite().all()


def test_a_cast_stays_within_the_finite_numbers() -> None:
    assert kept(torch.tensor([[1e6, -1e6, 3.0, torch.nan]]), FORMATS["float16"])[0, :3].tolist() == [65504, -65504, 3]


def test_every_code_of_fp8_is_read_as_torch_reads_it() -> None:
    codes = torch.cat((torch.arange(0x7F), torch.arange(0x80, 0xFF))).to(torch.uint8)
    out = torch.empty(1, 1, len(codes))
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16).view(torch.uint8)
    FORMATS["fp8"].decode(codes[None, None], one, out)
    assert torch.equal(out[0, 0], codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("name", "size"), [("int8", 34), ("fp8", 34), ("int4", 18), ("float16", 64), ("float32", 128)])
def test_a_block_holds_its_vectors_and_its_scales(name: str, size: int) -> None:
    cache = kernels.stored((5, 3, 2, 4, 8, 32), FORMATS[name], torch.bfloat16, "cpu")
    assert cache.shape == (5, 3, 2, 4, 8, 32)
    assert cache.rows.is_contiguous()
    assert cache.rows[0].nbytes == 3 * 2 * 4 * 8 * size
    layer = cache.layer(1)
    assert layer.shape == (5, 2, 4, 8, 32)
    cache.rows.zero_()
    layer.values[2, 1, 3, 7].view(torch.uint8).fill_(1)
    layer.scales[2, 1, 3].fill_(1)
    touched = cache.rows.nonzero()
    assert (touched[:, :4] == torch.tensor([2, 1, 1, 3])).all()
    assert len(touched) == FORMATS[name].vector_bytes(32) + 8 * FORMATS[name].scale_bytes


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_that_is_copied_says_the_same(name: str) -> None:
    cache = kernels.stored((4, 2, 2, 2, 8, 16), FORMATS[name], torch.float32, "cpu")
    cache.rows.fill_(0xFF)
    vectors = normal(32, 16)
    head_rows = torch.arange(4) + 8  # the first layer of block 1
    cache.layer(0).write(vectors, (head_rows[:, None] * 8 + torch.arange(8)).flatten())
    kernels.copy_blocks(cache.rows, torch.tensor([1]), torch.tensor([3]))
    out = torch.empty(4, 8 * 16)
    cache.layer(0).gather(head_rows + 16, out)
    assert torch.equal(out.view(32, 16), kept(vectors, FORMATS[name]))
    assert (cache.rows[[0, 2]] == 0xFF).all()
    assert (cache.rows[3, 1] == 0xFF).all()


def test_a_vector_without_whole_words_is_refused() -> None:
    with pytest.raises(ValueError, match="heads of 6 cannot be kept in int4"):
        kernels.stored((1, 1, 2, 1, 8, 6), FORMATS["int4"], torch.float32, "cpu")
    assert replace(FORMATS["int4"], name="x").row_bytes(8, 8) == 8 * (4 + 2)
