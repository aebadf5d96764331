"""What a model folder's `config.json` and `generation_config.json` say, as one frozen value for every family.

Knows the four families' fields and defaults; nothing of tensors. Whatever this decoder would compute differently from
what the folder asks is a `ConfigError` here, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pando.errors import ConfigError

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: `kind` is default, linear or llama3; the last three fields belong to llama3."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder with grouped-query attention, RMS norms, rotary positions and a gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: Rope
    windows: tuple[int | None, ...]  # one a layer; None sees everything
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    dtype: str  # of the checkpoint; "" where it does not say
    eos_token_ids: tuple[int, ...]
    window: int | None = None  # asked for at start: `windows` has none that is wider
    sinks: int = 0  # first positions that layers see beside that window

    @property
    def sink_window(self) -> int | None:
        """The window of layers that see sinks, if any do."""
        return self.window if self.sinks else None

    @property
    def num_kept(self) -> int | None:
        """The longest window, where every layer has one: positions farther back are read by nobody, but for sinks."""
        limited = [window for window in self.windows if window is not None]
        return max(limited) if len(limited) == len(self.windows) else None

    @property
    def sink_reach(self) -> int | None:
        """As how far behind the first sink a query scores sinks at most: as if they lay right before its window."""
        return None if self.window is None else self.window + self.sinks - 1


def with_window(config: ModelConfig, window: int, sinks: int) -> ModelConfig:
    """The same model where no layer sees farther back than `window` positions, but for the first `sinks`.

    A layer whose own window is narrower keeps it, without sinks. Raises `ConfigError` where the model never learned
    such distances.
    """
    if window + sinks > config.max_positions:
        raise ConfigError(f"window {window} and sinks {sinks} are over the model's {config.max_positions} positions")
    windows = tuple(window if own is None else min(own, window) for own in config.windows)
    return replace(config, windows=windows, window=window, sinks=sinks)


def read_config(folder: Path) -> ModelConfig:
    """Read a model folder. Raises `ConfigError` with one line on anything missing, malformed or unsupported."""
    fields = _read_json(folder / "config.json")
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    num_layers = _whole(fields, "num_hidden_layers")
    num_heads = _whole(fields, "num_attention_heads")
    hidden_size = _whole(fields, "hidden_size")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_whole(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_whole(fields, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_whole(fields, "num_key_value_heads", num_heads),
        head_dim=_whole(fields, "head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads),
        norm_eps=_number(fields, "rms_norm_eps", 1e-6),
        max_positions=_whole(fields, "max_position_embeddings", 2048),
        rope=_rope(fields),
        windows=_windows(fields, architecture, num_layers),
        qkv_bias=architecture == "Qwen2ForCausalLM" or _flag(fields, "attention_bias"),
        output_bias=architecture != "Qwen2ForCausalLM" and _flag(fields, "attention_bias"),
        mlp_bias=architecture == "LlamaForCausalLM" and _flag(fields, "mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_head=_flag(fields, "tie_word_embeddings"),
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(folder, fields),
    )
    if config.num_heads % config.num_kv_heads:
        raise ConfigError("config.json: num_attention_heads must be a multiple of num_key_value_heads")
    if config.head_dim % 2:
        raise ConfigError("config.json: head_dim must be even")
    return config


_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def _architecture(fields: Fields) -> str:
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str):
        raise ConfigError("config.json names no architecture")
    if name not in _ARCHITECTURES:
        raise ConfigError(f"architecture {name} is not supported; supported are {', '.join(_ARCHITECTURES)}")
    return name


def _refuse_unsupported(fields: Fields) -> None:
    if fields.get("quantization_config") is not None:
        raise ConfigError("config.json: quantized checkpoints are not supported")
    if fields.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act {fields['hidden_act']} is not supported; silu is")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor is not supported")


def _rope(fields: Fields) -> Rope:
    """Newer folders have `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConfigError("config.json: rope settings must be an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = _number(scaling, "rope_theta", _number(fields, "rope_theta", 10_000.0))
    if kind == "default":
        if any(isinstance(value, dict) for value in scaling.values()):
            raise ConfigError("config.json: rope settings per layer type are not supported")
        return Rope(theta=theta)
    if kind == "linear":
        return Rope("linear", theta, _number(scaling, "factor"))
    if kind == "llama3":
        low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
        if low >= high:
            raise ConfigError("config.json: low_freq_factor must be below high_freq_factor")
        original = _whole(scaling, "original_max_position_embeddings")
        return Rope("llama3", theta, _number(scaling, "factor"), low, high, original)
    raise ConfigError(f"rope type {kind} is not supported; supported are default, linear, llama3")


def _windows(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM" or fields.get("sliding_window") is None:
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        return (_whole(fields, "sliding_window"),) * num_layers
    if not _flag(fields, "use_sliding_window"):
        return (None,) * num_layers
    window = _whole(fields, "sliding_window")
    kinds = fields.get("layer_types")
    if kinds is None:
        full = _whole(fields, "max_window_layers", 28, least=0)
        kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigError("config.json: layer_types must name every layer")
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ConfigError("config.json: layer_types must be full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(fields: Fields) -> str:
    name = fields.get("dtype") or fields.get("torch_dtype") or ""
    if name not in ("", "float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json: dtype {name} is not supported")
    return str(name)


def _eos_token_ids(folder: Path, fields: Fields) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = _read_json(path) if path.exists() else {}
    ids = generation.get("eos_token_id", fields.get("eos_token_id"))
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token, int) and token >= 0 for token in listed):
        raise ConfigError("eos_token_id must be a token id or a list of them")
    return tuple(listed)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the model folder has no readable {path.name}") from error
    except ValueError as error:
        raise ConfigError(f"{path.name} of the model folder is not JSON") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path.name} of the model folder is not a JSON object")
    return fields


def _whole(fields: Fields, name: str, default: int | None = None, *, least: int = 1) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"config.json: {name} must be a whole number, {least} or more")
    return value


def _number(fields: Fields, name: str, default: float | None = None) -> float:
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {name} must be a positive number")
    return float(value)


def _flag(fields: Fields, name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise ConfigError(f"config.json: {name} must be true or false")
    return bool(value)
