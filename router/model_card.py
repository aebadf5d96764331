"""What the router reads of a model's folder: name, context, vocabulary, end-of-sequence ids, sampling defaults.

Knows nothing of weights and reads no tensor. A value of `generation_config.json` that this version cannot honour is
named in `ignored`, so that the process can say so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pando.errors import ConfigError

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets for the sampling fields it leaves unset."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model as requests see it. `context_length` counts prompt and answer together."""

    name: str
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    defaults: SamplingDefaults = SamplingDefaults()
    ignored: tuple[str, ...] = ()


def read_model_card(model: str, folder: Path) -> ModelCard:
    """Read the card of the model that settings call `model` from its folder; `ConfigError` names what is missing."""
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json", optional=True)
    return ModelCard(
        name=served_name(model, folder),
        context_length=_count(config, "max_position_embeddings"),
        vocab_size=_count(config, "vocab_size"),
        eos_token_ids=_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        defaults=_defaults(generation),
        ignored=_ignored(generation),
    )


def served_name(model: str, folder: Path) -> str:
    """The name clients use: a folder's own name (never its path), else the name as it is."""
    return folder.name if Path(model).expanduser().exists() else model


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} for an optional file that is not there."""
    if optional and not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path.name} in the model folder {path.parent}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path.name} in the model folder {path.parent} is not JSON") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path.name} in the model folder {path.parent} is not a JSON object")
    return found


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json has no usable {key}")
    return value


def _ids(raw: Any) -> tuple[int, ...]:
    if raw is None:
        return ()
    ids = raw if isinstance(raw, list) else [raw]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ConfigError("eos_token_id is neither a token id nor a list of them")
    return tuple(ids)


def _defaults(generation: dict[str, Any]) -> SamplingDefaults:
    plain = SamplingDefaults()
    greedy = generation.get("do_sample") is False
    return SamplingDefaults(
        max_tokens=int(generation.get("max_new_tokens") or plain.max_tokens),
        temperature=0.0 if greedy else _number(generation, "temperature", plain.temperature),
        top_k=max(0, int(_number(generation, "top_k", plain.top_k))),
        top_p=_number(generation, "top_p", plain.top_p),
        min_p=_number(generation, "min_p", plain.min_p),
    )


def _number(generation: dict[str, Any], key: str, default: float) -> float:
    value = generation.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} in generation_config.json is not a number")
    return float(value)


# Fields that change what a model says, with the value that changes nothing.
_NEUTRAL: dict[str, object] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None}


def _ignored(generation: dict[str, Any]) -> tuple[str, ...]:
    return tuple(key for key, neutral in _NEUTRAL.items() if generation.get(key, neutral) not in (neutral, None))
