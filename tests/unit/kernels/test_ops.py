"""The small operations against their definitions, in plain torch and in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

import kernels
from kernels import device, reference


@pytest.fixture(params=[reference, device], ids=["torch", "triton"])
def operations(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.double().pow(2).mean(-1, keepdim=True) + eps).sqrt()


def test_rms_norm(operations: ModuleType) -> None:
    x, weight = normal(5, 24), normal(24)
    torch.testing.assert_close(operations.rms_norm(x, weight, 1e-3).double(), normed(x, 1e-3) * weight)


def test_add_rms_norm_returns_the_sum_too(operations: ModuleType) -> None:
    x, residual, weight = normal(5, 24), normal(5, 24) + 1, normal(24)
    total = x + residual
    result, stream = operations.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(stream, total)
    torch.testing.assert_close(result.double(), normed(total, 1e-5) * weight)


def test_head_rms_norm_has_a_weight_for_each_head(operations: ModuleType) -> None:
    whole, weight = normal(5, 6, 8), normal(4, 8)
    x = whole.clone()
    operations.head_rms_norm_(x[:, :4], weight, 1e-5)
    torch.testing.assert_close(x[:, :4].double(), normed(whole[:, :4], 1e-5) * weight)
    assert torch.equal(x[:, 4:], whole[:, 4:])


def test_rotary_turns_pairs_half_a_head_apart() -> None:
    whole = normal(3, 4, 8)
    angle = normal(3, 4)
    x = whole.clone()
    cos = angle.cos()[:, None, None, :].expand(-1, 1, 2, -1)
    sin = angle.sin()[:, None, None, :] * torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1)
    kernels.rotary_(x[:, :3], cos, sin)
    turned = torch.view_as_complex(torch.stack(whole[:, :3].chunk(2, dim=-1), dim=-1))
    turned = turned * torch.polar(torch.ones(3, 1, 4), angle[:, None])
    torch.testing.assert_close(x[:, :3], torch.cat((turned.real, turned.imag), dim=-1))
    assert torch.equal(x[:, 3], whole[:, 3])


def test_rotated_keys_are_written(operations: ModuleType) -> None:
    whole, angle = normal(3, 8, 8), normal(3, 1, 1, 4)  # 4 query heads, 2 key heads
    cos = angle.cos().expand(-1, 1, 2, -1)
    sin = angle.sin() * torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1)
    turned, heads = whole.clone(), whole.clone()
    reference.rotary_(turned[:, :6], cos, sin)
    cache = torch.zeros(3, 1, 2, 2, 2, 8)
    plan = operations.plan_attention(cache, [2, 1], [2, 3], np.array([[1, -1], [-1, 2]]), num_heads=4, windows=[1])
    operations.rotary_write_kv(heads, cos, sin, cache[:, 0], plan)
    torch.testing.assert_close(heads[:, :4], turned[:, :4])
    written = torch.stack((cache[1, 0, :, :, 0], cache[1, 0, :, :, 1], cache[2, 0, :, :, 0]))
    torch.testing.assert_close(written.flatten(1, 2), turned[:, 4:])
    assert not cache[0].any()


def test_silu_mul(operations: ModuleType) -> None:
    gate_up = normal(4, 12)
    gate, up = gate_up[:, :6], gate_up[:, 6:]
    torch.testing.assert_close(operations.silu_mul(gate_up), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_blocks_reads_before_it_writes(dtype: torch.dtype) -> None:
    cache = normal(6, 2, 2, 2, 4, 8).to(dtype)
    before = cache.clone()
    kernels.copy_blocks(cache, torch.tensor([0, 1, 5]), torch.tensor([1, 3, 0]))
    assert torch.equal(cache, before[[5, 0, 2, 1, 4, 5]])


def test_merged_states_are_the_softmax_over_all() -> None:
    scores, values = 20 * normal(3, 5, 9), normal(3, 9, 8)
    cuts = [slice(0, 4), slice(4, 5), slice(5, 9)]
    parts = torch.stack([scores[..., cut].softmax(-1) @ values[:, cut] for cut in cuts])
    states = torch.stack([scores[..., cut].logsumexp(-1) for cut in cuts])
    expected = scores.softmax(-1) @ values
    torch.testing.assert_close(kernels.merge_states(parts, states), expected, atol=1e-6, rtol=1e-6)


def test_empty_parts_add_nothing() -> None:
    parts = normal(3, 4, 8)
    states = torch.tensor([[1.0, -torch.inf, -torch.inf, -900.0]] * 3)
    states[1:, :] = -torch.inf
    states[2, 1] = 5
    merged = kernels.merge_states(parts, states)
    torch.testing.assert_close(merged, torch.stack([parts[0, 0], parts[2, 1], torch.zeros(8), parts[0, 3]]))
