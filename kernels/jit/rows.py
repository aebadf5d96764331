"""What is done to each token's row apart from attention: cache write with rotation, norms, the gate of an MLP."""

import triton
import triton.language as tl

from kernels.jit.stored import store_kv


@triton.jit
def write_kernel(
    heads,  # [num_tokens, NUM_QUERY + 2 * num_kv_heads, head_dim], rows heads_stride apart
    cos,  # [num_tokens, 1, 2, head_dim / 2], rows cos_stride apart: as `kernels.rotary_` takes them
    sin,  # of which the first half is read: the negative one
    layer_kv,  # [num_blocks, 2, num_kv_heads, block_size, head_dim]; integers, or the bits of fp8, as KIND asks
    scales,  # [num_blocks, 2, num_kv_heads, block_size], as KIND has them
    slots,  # [num_tokens] int32; below 0 nothing is written
    heads_stride,
    cos_stride,
    sin_stride,
    block_stride,
    NUM_QUERY: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    HEAD_ROW: tl.constexpr,  # from one head to the next within a block
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,  # what the largest of a vector becomes, where KIND has scales
):
    """Rotate queries in place, and write keys, rotated too, and values into their slots."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HALF)
    mask = (head < NUM_QUERY + 2 * NUM_KV_HEADS)[:, None] & (dims < half)[None, :]
    at = heads + token * heads_stride + head[:, None] * HEAD_DIM + dims[None, :]
    low = tl.load(at, mask=mask, other=0.0)
    high = tl.load(at + half, mask=mask, other=0.0)
    if ROTATE:
        c = tl.load(cos + token * cos_stride + dims, mask=dims < half).to(tl.float32)[None, :]
        s = -tl.load(sin + token * sin_stride + dims, mask=dims < half).to(tl.float32)[None, :]
        turns = (head < NUM_QUERY + NUM_KV_HEADS)[:, None]
        x, y = low.to(tl.float32), high.to(tl.float32)
        low = tl.where(turns, (x * c - y * s).to(low.dtype), low)
        high = tl.where(turns, (y * c + x * s).to(high.dtype), high)
        is_query = mask & (head < NUM_QUERY)[:, None]
        tl.store(at, low, mask=is_query)
        tl.store(at + half, high, mask=is_query)
    slot = tl.load(slots + token).to(tl.int64)
    block, inside = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    row = (head - NUM_QUERY)[:, None]
    width: tl.constexpr = half if KIND == "int4" else HEAD_DIM
    target = layer_kv + block * block_stride + inside * width + row * HEAD_ROW
    scale_at = scales + block * (block_stride // 2) + inside + row * (HEAD_ROW // 2)
    first_written = tl.where(slot >= 0, NUM_QUERY, NUM_QUERY + 2 * NUM_KV_HEADS)
    mask = mask & (head >= first_written)[:, None]
    store_kv(low, high, target, scale_at, dims[None, :], mask, half, KIND, LARGEST)


@triton.jit
def norm_kernel(
    out,
    x,
    residual,
    weight,
    eps,
    x_stride,
    residual_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    """RMS norm of one row; with ADD of the sum of x and residual, which takes the place of residual."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    mask = at < SIZE
    value = tl.load(x + row * x_stride + at, mask=mask, other=0.0)
    if ADD:
        place = residual + row * residual_stride + at
        value = (value.to(tl.float32) + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(place, value, mask=mask)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    result = value * scale * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def head_norm_kernel(
    x,  # [num_tokens, num_heads, head_dim], rows x_stride apart; changed in place
    weight,  # [num_heads, head_dim]
    eps,
    x_stride,
    num_heads,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """RMS norm of each head, with its own weights."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, DIM)
    mask = (head < num_heads)[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = head[:, None] * HEAD_DIM + dims[None, :]
    at = x + tl.program_id(0).to(tl.int64) * x_stride + offsets
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + eps)
    result = value * scale[:, None] * tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, result.to(x.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_kernel(out, gate_up, SIZE, TILE: tl.constexpr):
    """`silu(gate) * up` of a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = at < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + at, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + at, result.to(out.dtype.element_ty), mask=mask)
