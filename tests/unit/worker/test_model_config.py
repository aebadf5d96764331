"""What a config.json means, in the spellings of old and new folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pando.errors import ConfigError
from worker.models.config import ModelConfig, Rope, read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, fields: object, generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


def test_what_is_not_said_follows_the_family(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rope) == (8, 8, Rope())
    assert config.windows == (None,) * 4
    assert not (config.qkv_bias or config.output_bias or config.mlp_bias or config.qk_norm or config.tied_head)
    assert read(tmp_path, QWEN2).qkv_bias and not read(tmp_path, QWEN2).output_bias
    assert read(tmp_path, QWEN3).qk_norm and read(tmp_path, QWEN3).head_dim == 128


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(theta=5e5)),
        ({"rope_theta": 1e6, "rope_scaling": None}, Rope(theta=1e6)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4}}, Rope("linear", 1e4, 4.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}, Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}}, Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_rope_of_old_and_new_folders(tmp_path: Path, fields: dict[str, Any], rope: Rope) -> None:
    assert read(tmp_path, LLAMA | fields).rope == rope


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (MISTRAL | {"sliding_window": 30}, (30,) * 4),
        (MISTRAL | {"sliding_window": None}, (None,) * 4),
        (QWEN2 | {"sliding_window": 30, "use_sliding_window": False}, (None,) * 4),
        (QWEN2 | {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 30)),
        (QWEN3 | {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 0}, (30,) * 4),
        (
            QWEN3
            | {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (9, None, 9, None),
        ),
        (LLAMA | {"sliding_window": 30}, (None,) * 4),
    ],
)
def test_windows(tmp_path: Path, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(tmp_path, fields).windows == windows


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_old_and_new_folders(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, LLAMA | {key: "bfloat16"}).dtype == "bfloat16"


def test_end_tokens_of_generation_config_go_first(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"eos_token_id": 5}).eos_token_ids == (5,)
    assert read(tmp_path, LLAMA | {"eos_token_id": 5}, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert read(tmp_path, LLAMA | {"eos_token_id": None}, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (LLAMA | {"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        (LLAMA | {"architectures": None}, "config.json names no architecture"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantized checkpoints are not supported"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type yarn is not supported"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type are not supported"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "factor must be a positive number"),
        (LLAMA | {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 4.0}}, "must be below high_freq_factor"),
        (LLAMA | {"rope_scaling": "linear"}, "rope settings must be an object"),
        (LLAMA | {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        (LLAMA | {"head_dim": 7}, "head_dim must be even"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size must be a whole number"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers must be a whole number, 1 or more"),
        (LLAMA | {"attention_bias": "yes"}, "attention_bias must be true or false"),
        (LLAMA | {"dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn is not supported"),
        (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"architectures": ["LlamaForCausalLM"]}, "num_hidden_layers must be a whole number"),
        ([1], "config.json of the model folder is not a JSON object"),
    ],
)
def test_what_is_refused(tmp_path: Path, fields: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, fields)
    assert "\n" not in str(caught.value)


def test_unreadable_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match=r"config\.json of the model folder is not JSON"):
        read_config(tmp_path)
