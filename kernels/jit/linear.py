"""A product whose every row is the same in any batch: one tile for any number of rows, inputs added up in order.

Knows numbers only. Invariant: a row of a tile takes the same steps whatever the other rows hold, and whether they are
there at all.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])  # one build for all
def linear_kernel(
    out,  # [num_rows, num_outputs]
    x,  # [num_rows, num_inputs]
    weight,  # [num_outputs, num_inputs]
    bias,  # [num_outputs], where HAS_BIAS
    num_rows,
    num_outputs,
    num_inputs,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    EVEN: tl.constexpr,  # whether INPUTS divides the inputs
):
    # Programs that follow one another share a part of the weight.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    there, wanted = rows < num_rows, outputs < num_outputs
    left = x + rows.to(tl.int64)[:, None] * num_inputs
    right = weight + outputs.to(tl.int64)[None, :] * num_inputs
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, num_inputs, INPUTS):
        at = first + tl.arange(0, INPUTS)
        if EVEN:
            some = tl.load(left + at[None, :], mask=there[:, None], other=0.0)
            across = tl.load(right + at[:, None], mask=wanted[None, :], other=0.0)
        else:
            live = at < num_inputs
            some = tl.load(left + at[None, :], mask=there[:, None] & live[None, :], other=0.0)
            across = tl.load(right + at[:, None], mask=wanted[None, :] & live[:, None], other=0.0)
        total = tl.dot(some, across, total, input_precision="tf32x3")
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=wanted, other=0.0).to(tl.float32)[None, :]
    at_out = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=there[:, None] & wanted[None, :])
