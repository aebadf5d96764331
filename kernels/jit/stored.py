"""Keys and values in fewer bits than they are computed in: reading tiles of them, and writing rows.

What the formats are is in `kernels.quantize`. Rounding is written out in integers, so that it is the same on every
processor. KIND is the name of a format that has scales, or "same" for numbers that are at most cast.
"""

import triton
import triton.language as tl

from kernels.jit.softmax import load_rows

# Added and subtracted, it leaves the nearest whole number, half to even, of anything below 2^22.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def head_addresses(layer_kv, scales, head, NUM_KV_HEADS: tl.constexpr, HEAD_ROW: tl.constexpr):
    """Where the keys of a head begin in block 0 and their scales, and the values and theirs."""
    keys_of, key_scales_of = layer_kv + head * HEAD_ROW, scales + head * (HEAD_ROW // 2)
    values_of, value_scales_of = keys_of + NUM_KV_HEADS * HEAD_ROW, key_scales_of + NUM_KV_HEADS * (HEAD_ROW // 2)
    return keys_of, key_scales_of, values_of, value_scales_of


@triton.jit
def load_kv(
    vectors_of,
    scales_of,
    blocks,
    positions,
    live,
    block_stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    MATH: tl.constexpr,
):
    """`[positions, DIM]` of one head in MATH, and their scales `[positions]` if KIND has any: zero where not live."""
    at, inside = blocks.to(tl.int64) * block_stride, positions % BLOCK_SIZE
    if KIND == "int4":
        dims = tl.arange(0, DIM)
        half: tl.constexpr = HEAD_DIM // 2
        pointers = vectors_of + (at + inside * half)[:, None] + (dims % half)[None, :]
        pairs = tl.load(pointers, mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0x88)
        # The bytes are read twice, at the price of a cache's time, so that no element moves between threads.
        four = tl.where((dims < half)[None, :], pairs & 15, pairs >> 4)
        rows = (four.to(tl.int8) - 8).to(MATH)
    else:
        rows = load_rows(vectors_of, at + inside * HEAD_DIM, live, HEAD_DIM, DIM, MASKED).to(MATH)
    scales = live if KIND == "same" else tl.load(scales_of + at // 2 + inside, mask=live, other=0.0).to(tl.float32)
    return rows, scales


@triton.jit
def store_kv(
    low,
    high,
    vectors_of,
    scale_at,
    offsets,
    mask,
    HALF_DIM: tl.constexpr,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write vectors `[heads, HALF]` low and high, zero where masked: the places of their elements are `offsets` behind
    `vectors_of[heads, 1]`, of their scales `scale_at[heads, 1]`."""
    if KIND == "same":
        to: tl.constexpr = vectors_of.dtype.element_ty
        if to == tl.float16 and low.dtype != to:
            low, high = clamped(low.to(tl.float32), 65504.0), clamped(high.to(tl.float32), 65504.0)
        tl.store(vectors_of + offsets, low, mask=mask)
        tl.store(vectors_of + HALF_DIM + offsets, high, mask=mask)
    else:
        scale, divisor = scales(low.to(tl.float32), high.to(tl.float32), LARGEST)
        tl.store(scale_at, scale.to(scale_at.dtype.element_ty), mask=tl.max(mask.to(tl.int32), 1, keep_dims=True) > 0)
        low = clamped(tl.div_rn(low.to(tl.float32), divisor), LARGEST)
        high = clamped(tl.div_rn(high.to(tl.float32), divisor), LARGEST)
        if KIND == "fp8":
            tl.store(vectors_of + offsets, e4m3(low), mask=mask)
            tl.store(vectors_of + HALF_DIM + offsets, e4m3(high), mask=mask)
        else:
            low, high = ((low + ROUND) - ROUND).to(tl.int32), ((high + ROUND) - ROUND).to(tl.int32)
            if KIND == "int4":
                pairs = (low + 8) | ((high + 8) << 4)
                tl.store(vectors_of + offsets, pairs.to(tl.uint8), mask=mask)
            else:
                tl.store(vectors_of + offsets, low.to(tl.int8), mask=mask)
                tl.store(vectors_of + HALF_DIM + offsets, high.to(tl.int8), mask=mask)


@triton.jit
def scales(low, high, LARGEST: tl.constexpr):
    """Of each row `[rows, 1]` the largest magnitude over LARGEST, of bfloat16's numbers the nearest; and what to divide
    by. NaN, and a divisor of one, for a row that is not all finite."""
    most = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1, keep_dims=True)
    most += tl.sum(low * 0.0 + high * 0.0, 1, keep_dims=True)
    scale = most * (1.0 / LARGEST)
    bits = scale.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    positive = scale > 0.0  # not of zero, nor of NaN, whose bits could overflow
    scale = tl.where(positive, nearest.to(tl.float32, bitcast=True), scale)
    return scale, tl.where(positive, scale, 1.0)


@triton.jit
def clamped(x, most):
    """Within +-most; NaN stays."""
    x = tl.where(x > most, most, x)
    return tl.where(x < -most, -most, x)


@triton.jit
def e4m3(x):
    """The bits of the nearest float8 e4m3, half to even, of x within +-448."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the code is the number of steps of 2^-9, which the sum has in its last bits.
    small = (magnitude * 512.0 + ROUND).to(tl.int32, bitcast=True) & 0xFF
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < 0.015625, small, normal) | sign).to(tl.uint8)
