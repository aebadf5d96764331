"""Compile kernels for sm_90 and print what became of them, as JSON: `python -m tests.kernel_builds KIND`, of one kind
of KV. Needs no GPU.

A process of its own, because in the tests' process Triton is interpreted. Compiler and disassembler are those that
Triton's own wheel carries.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.configs import PRODUCT, SamplingConfig, tuning
from kernels.jit.decode import decode_kernel, merge_kernel
from kernels.jit.linear import linear_kernel
from kernels.jit.rows import norm_kernel, write_kernel
from kernels.jit.sampling import ban_kernel, sample_kernel
from kernels.jit.wide import wide_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_.]+)", re.MULTILINE)
FLOATS = {"parts", "states", "logits", "list_values"}
LONGS = {"drawn", "rows", "banned"}
# Of a layer in each format what attention reads, and what is written.
READ = {"same": "*bf16", "int8": "*i8", "fp8": "*fp8e4nv", "int4": "*u8"}
WRITTEN = READ | {"fp8": "*u8"}
LARGEST = {"same": 0.0, "int8": 127.0, "fp8": 448.0, "int4": 7.0}
ROW_BYTES = {"same": 128, "int8": 130, "fp8": 130, "int4": 66}  # of a token, scale included; elements of "same"
NUMBERS = {"tables", "items", "part_slots", "counters", "tokens", "positions", "slots", "list_ids", "merges"}


def variants(kind: str) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Kernel, constants and options of each build: the shapes of an 8B model, block size 16."""
    row = {"NUM_QUERY": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "HALF": 64, "BLOCK_SIZE": 16, "HEADS": 8}
    row |= {"ROTATE": True, "LARGEST": LARGEST[kind], **layout(kind)}
    made = attentions(kind) | {"write": (write_kernel, row, {"num_warps": 2})}
    if kind == "same":
        made |= products()
        made["norm"] = (norm_kernel, {"SIZE": 4096, "WIDTH": 4096, "ADD": True}, {"num_warps": 8})
        made |= sampling()
    return made


def sampling() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    config = SamplingConfig()
    sizes = {"TILE": config.tile, "ROOM": config.room, "GUIDE": config.guide, "STEP": config.step}
    sizes |= {"PIVOTS": config.pivots, "STAGES": config.num_stages}
    return {
        "sample": (sample_kernel, sizes, {"num_warps": config.num_warps, "enable_fp_fusion": False}),
        "ban": (ban_kernel, {"SIZE": 128}, {}),
    }


def products() -> dict[str, tuple[Any, dict[str, Any], dict[str, int]]]:
    """Deterministic mode's own."""
    tile = {"ROWS": PRODUCT.rows, "OUTPUTS": PRODUCT.outputs, "INPUTS": PRODUCT.inputs}
    merging = {"NUM_KV_HEADS": 8, "GROUP": 4, "ROWS": 4, "HEAD_DIM": 128, "DIM": 128, "STEP": 1}
    return {
        "linear": (
            linear_kernel,
            tile | {"EVEN": True, "HAS_BIAS": False},
            {"num_warps": PRODUCT.num_warps, "num_stages": PRODUCT.num_stages},
        ),
        "merge, fixed": (merge_kernel, merging, {}),
    }


def layout(kind: str) -> dict[str, Any]:
    return {"HEAD_ROW": 16 * ROW_BYTES[kind], "KIND": kind}


def attentions(kind: str) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    heads = {"NUM_KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": 128, "DIM": 128, "BLOCK_SIZE": 16, "HAS_SINKS": False}
    heads |= layout(kind)
    tuned = tuning(128, 2, scaled=kind != "same")
    decode, wide, many = tuned.decode, tuned.wide, tuned.many
    made: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "decode": (
            decode_kernel,
            heads | {"ROWS": 16, "MERGE_ROWS": 4, "MERGE_STEP": 16, "TILE": decode.tile},
            {"num_warps": decode.num_warps, "num_stages": decode.num_stages},
        ),
        "wide": (
            wide_kernel,
            heads | {"ROWS": wide.rows, "TILE": wide.tile, "FIXED": False},
            {"num_warps": wide.num_warps, "num_stages": wide.num_stages},
        ),
        "wide, fixed": (
            wide_kernel,
            heads | {"ROWS": wide.rows, "TILE": wide.tile, "FIXED": True},
            {"num_warps": wide.num_warps, "num_stages": wide.num_stages},
        ),
    }
    if many != wide:
        made["wide, many"] = (
            wide_kernel,
            heads | {"ROWS": many.rows, "TILE": many.tile, "FIXED": False},
            {"num_warps": many.num_warps, "num_stages": many.num_stages},
        )
    return made


def build(kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Compile with bfloat16 tensors, 16-byte aligned, and count instructions."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _kind(name)
        if name == "layer_kv":
            signature[name] = (WRITTEN if kernel is write_kernel else READ)[constants["KIND"]]
        if name not in constants and signature[name] != "fp32" and name not in ("table_stride", "num_rows"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"shared": compiled.metadata.shared, "instructions": Counter(INSTRUCTION.findall(text))}


def _kind(name: str) -> str:
    if name in ("scale", "eps"):
        return "fp32"
    if name.endswith("stride") or name in ("vocab", "count") or name.startswith("num_"):
        return "i32"
    return "*fp32" if name in FLOATS else "*i64" if name in LONGS else "*i32" if name in NUMBERS else "*bf16"


if __name__ == "__main__":
    json.dump({name: build(*variant) for name, variant in variants(sys.argv[1]).items()}, sys.stdout)
