"""Tensors in, tensors out: the operations a decoder over paged KV needs, in plain torch on any device.

Knows tensors, block tables and slots; nothing of sequences, tenants or scheduling. Invariant: an operation reads no
cache position outside the context it was given, so garbage (NaN too) in unused positions never reaches a result.

Dimensions, named once:

    num_tokens     rows of one step, all its sequences packed one after the other
    num_seqs       sequences of one step
    num_heads      query heads; num_kv_heads key and value heads; group = num_heads // num_kv_heads
    head_dim       width of one head
    num_blocks     KV blocks of the pool; block_size token positions of a block; max_blocks width of a block table
    num_layers     layers whose KV a block holds
    query_len      tokens of a sequence computed in this step; context_len those plus all before them
    slot           block_id * block_size + offset: one token position in the pool

The cache is one allocation, `kv_cache[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` (2: key, value);
`layer_kv = kv_cache[:, layer]` is a view of one layer, `[num_blocks, 2, num_kv_heads, block_size, head_dim]`.
"""

from kernels.plan import AttentionPlan, plan_attention
from kernels.reference import (
    add_rms_norm,
    attention,
    copy_blocks,
    head_rms_norm_,
    merge_states,
    rms_norm,
    rotary_,
    silu_mul,
    sink_attention,
    write_kv,
)
from kernels.sampling import counter_uniform, sample

__all__ = [
    "AttentionPlan",
    "add_rms_norm",
    "attention",
    "copy_blocks",
    "counter_uniform",
    "head_rms_norm_",
    "merge_states",
    "plan_attention",
    "rms_norm",
    "rotary_",
    "sample",
    "silu_mul",
    "sink_attention",
    "write_kv",
]
