"""Random-weight checkpoints of real shapes, as Hugging Face lays them out: configuration, safetensors, a tokenizer.

Knows shapes and files. The values mean nothing and the speed is that of the real model. Invariant: the same shape and
seed give the same tensors, and a folder is either whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pando.errors import ConfigError

STD = 0.02
END_ID = 0
SHARD_BYTES = 4 << 30
CACHE_VARIABLE = "XDG_CACHE_HOME"

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a decoder's speed depends on."""

    architecture: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope: Mapping[str, Any]
    tied: bool = False
    norm_eps: float = 1e-5

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return self.architecture == "Qwen3ForCausalLM"

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(_count(size) for _, size in self.tensors())

    @property
    def step_parameters(self) -> int:
        """That a decode step reads: all but the embedding's rows, where the head is not tied to it."""
        return self.parameters - (0 if self.tied else self.vocab_size * self.hidden_size)

    @property
    def matmul_parameters(self) -> int:
        """That every token of a prefill is multiplied with: the layers' matrices, without embedding and head."""
        return sum(_count(size) for name, size in self.tensors() if len(size) == 2 and ".layers." in name)

    def tensors(self) -> Iterator[tuple[str, Size]]:
        """Name and size of each, in the order of the file."""
        hidden, wide = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            yield name + "input_layernorm.weight", (hidden,)
            yield name + "self_attn.q_proj.weight", (queries, hidden)
            yield name + "self_attn.k_proj.weight", (keys, hidden)
            yield name + "self_attn.v_proj.weight", (keys, hidden)
            yield name + "self_attn.o_proj.weight", (hidden, queries)
            if self.qk_norm:
                yield name + "self_attn.q_norm.weight", (self.head_dim,)
                yield name + "self_attn.k_norm.weight", (self.head_dim,)
            yield name + "post_attention_layernorm.weight", (hidden,)
            yield name + "mlp.gate_proj.weight", (wide, hidden)
            yield name + "mlp.up_proj.weight", (wide, hidden)
            yield name + "mlp.down_proj.weight", (hidden, wide)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, hidden)

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "architectures": [self.architecture],
            "model_type": "qwen3" if self.qk_norm else "llama",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": END_ID,
            "eos_token_id": END_ID,
            "pad_token_id": END_ID,
            **self.rope,
        }


_LLAMA3_ROPE = {
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3 = {"vocab_size": 151_936, "max_positions": 40_960, "rope": {"rope_theta": 1_000_000.0}, "norm_eps": 1e-6}
SHAPES = {
    "llama-40m": ModelShape("LlamaForCausalLM", 512, 8, 8, 2, 64, 1536, 8192, 8192, {"rope_theta": 10_000.0}),
    "llama-3.1-8b": ModelShape("LlamaForCausalLM", 4096, 32, 32, 8, 128, 14_336, 128_256, 131_072, _LLAMA3_ROPE),
    "qwen3-0.6b": ModelShape("Qwen3ForCausalLM", 1024, 28, 16, 8, 128, 3072, tied=True, **_QWEN3),  # type: ignore[arg-type]
    "qwen3-8b": ModelShape("Qwen3ForCausalLM", 4096, 36, 32, 8, 128, 12_288, **_QWEN3),  # type: ignore[arg-type]
}


def cache_folder() -> Path:
    """Where checkpoints are kept unless a folder is named."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache") / "pando" / "bench"


def checkpoint(name: str, *, seed: int = 0, folder: Path | None = None) -> Path:
    """The folder of the named shape's checkpoint, made if it is not there. `ConfigError` for an unknown name."""
    if name not in SHAPES:
        raise ConfigError(f"no shape {name}; there are {', '.join(SHAPES)}")
    target = (folder or cache_folder()) / f"{name}-seed{seed}"
    if not (target / "config.json").is_file():
        write_checkpoint(target, SHAPES[name], seed)
    return target


def write_checkpoint(target: Path, shape: ModelShape, seed: int, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all files beside `target`, then give them its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_weights(partial, shape, seed, shard_bytes)
        byte_tokenizer(shape.vocab_size).save(str(partial / "tokenizer.json"))
        end = token_texts(shape.vocab_size)[END_ID]
        marks = {"bos_token": end, "eos_token": end, "pad_token": end, "add_bos_token": False}
        _dump(partial / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **marks})
        _dump(partial / "generation_config.json", {"eos_token_id": END_ID, "bos_token_id": END_ID, "do_sample": False})
        _dump(partial / "config.json", shape.config())
        partial.chmod(0o755)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def random_tensor(name: str, size: Size, seed: int) -> torch.Tensor:
    """bfloat16; norms are ones, all else is normal, by name and seed."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    draws = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(size).normal_(0.0, STD, generator=draws).to(torch.bfloat16)


def token_texts(vocab_size: int) -> list[str]:
    """What stands for each id: an end mark, the bytes in byte-level BPE's letters, then pairs of letters and numbers
    that no text is cut into: prompts of a benchmark are ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = ["<|end|>", *letters, letters[0] * 2]
    return (texts + [f"t{number}" for number in range(len(texts), vocab_size)])[:vocab_size]


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Every text becomes its bytes, and every id has a text."""
    texts = token_texts(vocab_size)
    first = texts[1]
    merges = [(first, first)]  # readers of the format refuse a file without any
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([texts[END_ID]])
    return tokenizer


def _write_weights(folder: Path, shape: ModelShape, seed: int, shard_bytes: int) -> None:
    shards = list(_shards(shape, shard_bytes))
    if len(shards) == 1:
        _save(folder / "model.safetensors", shards[0], seed)
        return
    places: dict[str, str] = {}
    for number, sizes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _save(folder / file, sizes, seed)
        places |= dict.fromkeys(sizes, file)
    _dump(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _shards(shape: ModelShape, most_bytes: int) -> Iterator[dict[str, Size]]:
    sizes: dict[str, Size] = {}
    total = 0
    for name, size in shape.tensors():
        if sizes and total + 2 * _count(size) > most_bytes:
            yield sizes
            sizes, total = {}, 0
        sizes[name] = size
        total += 2 * _count(size)
    yield sizes


def _save(path: Path, sizes: Mapping[str, Size], seed: int) -> None:
    save_file({name: random_tensor(name, size, seed) for name, size in sizes.items()}, path, metadata={"format": "pt"})


def _count(size: Size) -> int:
    return torch.Size(size).numel()


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
