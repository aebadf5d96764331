"""Random-weight checkpoints of every family, made by transformers, which is also the oracle of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

SMALL: dict[str, Any] = {
    "vocab_size": 1031,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
FAMILIES: dict[str, Any] = {
    "llama2": lambda: LlamaConfig(**SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 80}),
    "llama3": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biased": lambda: LlamaConfig(
        **SMALL | {"num_key_value_heads": 6}, rope_parameters=LINEAR_ROPE, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=21),
    "mistral-full": lambda: MistralConfig(**SMALL, sliding_window=None, head_dim=24),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-mixed": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=13, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=48),
    "qwen3-biased": lambda: Qwen3Config(**SMALL | {"num_key_value_heads": 1}, head_dim=16, attention_bias=True),
}


def make_checkpoint(folder: Path, family: str, *, shard_bytes: int | None = None) -> PreTrainedModel:
    """Write a checkpoint whose next tokens are far from ties; returns the model in float32 as the oracle."""
    torch.set_num_threads(1)  # models this small only wait for a second thread
    config = FAMILIES[family]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(sum(family.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(
                    noise * (3.0 if "embed" in name or "head" in name else 1.2) * parameter.shape[-1] ** -0.5
                )
    model.save_pretrained(folder, **({} if shard_bytes is None else {"max_shard_size": shard_bytes}))
    return model


def oracle_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size]"""
    with torch.inference_mode():
        return model(torch.tensor([list(token_ids)])).logits[0]
