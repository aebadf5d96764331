"""The files of a checkpoint folder: tokenizer, configuration, weights, as Hugging Face lays them out.

Knows nothing of how the weights came to be. A folder that others read changes file by file, each whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from bench.pando_tiny.corpus import END, END_OF_TEXT, SPECIAL_TOKENS
from bench.pando_tiny.model import Llama, Shape
from pando.errors import ConfigError

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE without a normalizer: every text decodes to itself. A small corpus gives a smaller vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an earlier checkpoint; `ConfigError` if it is not one of ours."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"no tokenizer.json in {folder}")
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError(f"{path} cannot be read as a tokenizer") from error
    if any(tokenizer.token_to_id(token) is None for token in SPECIAL_TOKENS):
        raise ConfigError(f"{path} lacks one of the tokens {', '.join(SPECIAL_TOKENS)}")
    return tokenizer


def prepare(folder: Path) -> None:
    """Make sure that `folder` can take a checkpoint, long before there is one to write."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds other files and no checkpoint")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error


def write(folder: Path, model: Llama, tokenizer: Tokenizer, record: Mapping[str, object]) -> None:
    """Write all files beside `folder`, then move each into it; weights are rounded to bfloat16."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer.save(str(partial / "tokenizer.json"))
        weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        for name, content in _json_files(model.shape, tokenizer).items():
            _dump(partial / name, content)
        _dump(partial / "training.json", record)
        for path in sorted(partial.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(folder: Path) -> tuple[Llama, Tokenizer]:
    """The model in float32 with the weights as written, and its tokenizer; `ConfigError` if it is not one of ours."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model = Llama(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
        weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} is no checkpoint that this script wrote") from error
    return model.eval(), read_tokenizer(folder)


def _json_files(shape: Shape, tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    end_of_text, end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": [end, end_of_text],
        "pad_token_id": end_of_text,
    }
    tokenizer_config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position_embeddings,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {**ids, "do_sample": False}  # so small a model says most sense when it says what is likeliest
    return {"config.json": config, "tokenizer_config.json": tokenizer_config, "generation_config.json": generation}


def _dump(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
