"""Writes a Llama checkpoint as GGUF, the file of llama.cpp: version 3, little-endian, one file.

Knows the format's layout and the names of a Llama's parts. Invariant: the tensors are those of the checkpoint, in
float32 or bfloat16, queries and keys in the order that GGUF's rotation wants.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open

from pando.errors import ConfigError
from worker.weights import weight_files

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
UINT32, FLOAT32, STRING, ARRAY, INT32 = 4, 6, 8, 9, 5
TYPES = {"float32": (0, torch.float32), "bfloat16": (30, torch.bfloat16)}
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(folder: Path, target: Path, dtype: str) -> None:
    """The checkpoint in `folder` as one file. `ConfigError` for one that is no Llama with plain rotary positions."""
    config = json.loads((folder / "config.json").read_bytes())
    if config["architectures"] != ["LlamaForCausalLM"] or config.get("rope_scaling"):
        raise ConfigError("only a Llama without rope scaling can be written as GGUF")
    fields = [*_model_fields(config, dtype), *_tokenizer_fields(folder)]
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        _write(file, fields, list(_tensors(folder, config, dtype)), TYPES[dtype][0])
    partial.rename(target)


def rotated_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `[heads * head_dim, hidden]` where the two of a rotated pair lie half a head apart, as rows where they are
    neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _model_fields(config: dict[str, Any], dtype: str) -> list[tuple[str, bytes]]:
    whole = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "rope.dimension_count": config["head_dim"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    return [
        ("general.architecture", _string("llama")),
        ("general.file_type", _uint32({"float32": 0, "bfloat16": 32}[dtype])),
        *((f"llama.{name}", _uint32(value)) for name, value in whole.items()),
        ("llama.rope.freq_base", _float32(config["rope_theta"])),
        ("llama.attention.layer_norm_rms_epsilon", _float32(config["rms_norm_eps"])),
    ]


def _tokenizer_fields(folder: Path) -> list[tuple[str, bytes]]:
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    texts = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {one["content"] for one in tokenizer["added_tokens"]}
    merges = [one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]]
    end = next(number for number, text in enumerate(texts) if text in special)
    return [
        ("tokenizer.ggml.model", _string("gpt2")),
        ("tokenizer.ggml.pre", _string("gpt-2")),
        ("tokenizer.ggml.tokens", _array(STRING, [_text(text) for text in texts])),
        (
            "tokenizer.ggml.token_type",
            _array(INT32, [struct.pack("<i", CONTROL_TOKEN if text in special else NORMAL_TOKEN) for text in texts]),
        ),
        ("tokenizer.ggml.merges", _array(STRING, [_text(merge) for merge in merges])),
        ("tokenizer.ggml.bos_token_id", _uint32(end)),
        ("tokenizer.ggml.eos_token_id", _uint32(end)),
    ]


def _tensors(folder: Path, config: dict[str, Any], dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each; norms stay float32, as the format wants."""
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                value = file.get_tensor(name)
                part = name.split(".", 3)[-1].removesuffix(".weight")
                if part in heads:
                    value = rotated_pairs(value, heads[part])
                kind = TYPES[dtype][1] if value.dim() == 2 else torch.float32
                yield _gguf_name(name, part), value.to(kind).contiguous()


def _gguf_name(name: str, part: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    return f"blk.{name.split('.')[2]}.{_NAMES[part]}.weight"


def _write(
    file: IO[bytes], fields: Sequence[tuple[str, bytes]], tensors: Sequence[tuple[str, torch.Tensor]], kind: int
) -> None:
    file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields)))
    for name, value in fields:
        file.write(_text(name) + value)
    offset = 0
    for name, tensor in tensors:
        sizes = tuple(reversed(tensor.shape))
        file.write(_text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        file.write(struct.pack("<IQ", kind if tensor.dim() == 2 else 0, offset))
        offset += _padded(tensor.nbytes)
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for _, tensor in tensors:
        file.write(tensor.view(torch.uint8).numpy().tobytes())
        file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _string(text: str) -> bytes:
    return struct.pack("<I", STRING) + _text(text)


def _uint32(value: int) -> bytes:
    return struct.pack("<II", UINT32, value)


def _float32(value: float) -> bytes:
    return struct.pack("<If", FLOAT32, value)


def _array(kind: int, items: Sequence[bytes]) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(items)
