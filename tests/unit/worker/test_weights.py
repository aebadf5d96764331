"""Checkpoints on disk: whole, sharded, damaged; and the digest that says whose KV is interchangeable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pando.errors import ConfigError
from tests.oracle import make_checkpoint, oracle_logits
from tests.runner_driver import Driver, load, random_tokens
from worker import weights
from worker.models.config import read_config
from worker.weights import fingerprint

PROMPT = random_tokens(20, seed=4)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_checkpoint(folder, "llama2")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def logits(folder: Path, **settings: Any) -> torch.Tensor:
    runner = load(folder, **settings)
    driver = Driver(runner)
    try:
        return driver.logits(driver.start(PROMPT))
    finally:
        runner.close()


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_sharded_checkpoint(tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path, "llama2", shard_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(tmp_path), oracle_logits(oracle, PROMPT), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("stored", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_half_precision_checkpoint_computed_in_float32(tmp_path: Path, stored: torch.dtype, name: str) -> None:
    make_checkpoint(tmp_path, "qwen2").to(stored).save_pretrained(tmp_path)
    assert read_config(tmp_path).dtype == name
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    torch.testing.assert_close(logits(tmp_path), oracle_logits(oracle, PROMPT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "qwen2-mixed"])
def test_computed_in_half_precision(tmp_path: Path, family: str, dtype: str) -> None:
    oracle = make_checkpoint(tmp_path, family)
    expected = oracle_logits(oracle, PROMPT)
    ours = logits(tmp_path, dtype=dtype)
    assert ours.dtype == torch.float32
    error = (ours - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == "bfloat16" else 0.006)


def test_tied_head_may_be_stored_and_old_frequencies_too(tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path, "llama3")
    edit(
        tmp_path,
        lambda tensors: tensors.update(
            {"lm_head.weight": torch.ones(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        ),
    )
    torch.testing.assert_close(logits(tmp_path), oracle_logits(oracle, PROMPT), atol=1e-4, rtol=0)


def test_missing_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ConfigError, match=r"the checkpoint has no tensor model\.layers\.1\.self_attn\.k_proj\.weight"):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=152)
    with pytest.raises(
        ConfigError, match=r"gate_proj\.weight has shape \[144, 96\] where the config needs \[152, 96\]"
    ):
        load(folder)


def test_left_over_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(240)}))
    with pytest.raises(ConfigError, match=r"does not use, model\.layers\.0\.self_attn\.q_proj\.bias among them"):
        load(folder)


def test_integer_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(96, dtype=torch.int8)}))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is not of a floating-point type"):
        load(folder)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, None])
def test_corrupt_file(folder: Path, damage: bytes | None) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(ConfigError, match=r"model\.safetensors of the model folder is not a readable safetensors file"):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json of the model folder is not readable"),
        ('{"weight_map": []}', "index.json of the model folder is not readable"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not in the model folder"),
        ('{"weight_map": {"a": "../model/model.safetensors"}}', "which is not in the model folder"),
    ],
)
def test_bad_index(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def digest(folder: Path, kv_dtype: str = "float32") -> bytes:
    return fingerprint(folder, read_config(folder), kv_dtype)


def test_fingerprint_is_that_of_the_content(folder: Path, whole: Path) -> None:
    assert len(digest(folder)) == 16
    assert digest(folder) == digest(whole)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    edit_config(folder, dtype="bfloat16", transformers_version="0")
    assert digest(folder) == digest(whole), "neither end tokens nor the stored dtype's name change KV"


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        flip_a_bit,
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
        lambda folder: edit_config(folder, rms_norm_eps=1e-3),
    ],
    ids=["weights", "rope", "norm"],
)
def test_fingerprint_sees_every_change(folder: Path, whole: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    assert digest(folder) != digest(whole)


def test_fingerprint_depends_on_the_kv_dtype(whole: Path) -> None:
    assert digest(whole, "bfloat16") != digest(whole, "float32")


def test_fingerprint_of_large_checkpoints_is_sampled(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entire = digest(whole)
    monkeypatch.setattr(weights, "WHOLE_DIGEST_BYTES", 1000)
    assert digest(folder) == digest(whole) != entire
    edit(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert digest(folder) != digest(whole)
