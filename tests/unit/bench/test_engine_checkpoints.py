"""Random checkpoints: the same by seed, and readable by whoever reads real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from bench.engine.checkpoints import SHAPES, ModelShape, byte_tokenizer, checkpoint, random_tensor, write_checkpoint
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker.model_runner import load_model_runner
from worker.models.config import read_config
from worker.weights import weight_files

SMALL = replace(SHAPES["llama-40m"], hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
                vocab_size=320)  # fmt: skip
QWEN = replace(SMALL, architecture="Qwen3ForCausalLM", tied=True)


def test_real_shapes_have_their_models_size() -> None:
    billions = {name: round(shape.parameters / 1e9, 2) for name, shape in SHAPES.items()}
    assert billions == {"llama-40m": 0.03, "llama-3.1-8b": 8.03, "qwen3-0.6b": 0.6, "qwen3-8b": 8.19}


def test_a_seed_says_every_value() -> None:
    assert torch.equal(random_tensor("a", (4, 4), 1), random_tensor("a", (4, 4), 1))
    assert not torch.equal(random_tensor("a", (4, 4), 1), random_tensor("b", (4, 4), 1))
    assert not torch.equal(random_tensor("a", (4, 4), 1), random_tensor("a", (4, 4), 2))


@pytest.mark.parametrize("shape", [SMALL, QWEN], ids=["llama", "qwen3"])
def test_our_own_runner_loads_it(tmp_path: Path, shape: ModelShape) -> None:
    write_checkpoint(tmp_path / "model", shape, 0)
    runner = load_model_runner(WorkerSettings(model=str(tmp_path / "model"), device="cpu", device_blocks=4))
    assert runner.spec.vocab_size == shape.vocab_size
    runner.close()


def test_what_is_too_large_for_one_file_is_in_several(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", SMALL, 0, shard_bytes=30_000)
    files = weight_files(tmp_path / "model")
    names = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names += list(opened.keys())
    assert len(files) > 1
    assert sorted(names) == sorted(name for name, _ in SMALL.tensors())
    assert read_config(tmp_path / "model").num_layers == 2


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    first = checkpoint("small", folder=tmp_path)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert checkpoint("small", folder=tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in tmp_path.iterdir()] == [first.name]


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ConfigError, match="no shape nothing"):
        checkpoint("nothing")


def test_texts_come_back_and_every_id_has_one(tmp_path: Path) -> None:
    byte_tokenizer(400).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("Bäume, all one.").ids) == "Bäume, all one."
    assert tokenizer.get_vocab_size() == 400
    assert all(tokenizer.id_to_token(number) for number in range(400))
