"""GGUF files: the header, the tensors and their places, and the order of rotated rows."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.engine.checkpoints import SHAPES, random_tensor, write_checkpoint
from bench.engine.gguf import rotated_pairs, write_gguf
from pando.errors import ConfigError

SMALL = replace(SHAPES["llama-40m"], hidden_size=32, layers=1, heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
                vocab_size=320)  # fmt: skip


class Reader:
    """Reads what the format's description says, from the start."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, kind: str) -> int | float:
        [value] = struct.unpack_from("<" + kind, self.raw, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def text(self) -> str:
        size = int(self.take("Q"))
        self.at += size
        return self.raw[self.at - size : self.at].decode()

    def value(self, kind: int) -> object:
        match kind:
            case 4:
                return self.take("I")
            case 5:
                return self.take("i")
            case 6:
                return self.take("f")
            case 8:
                return self.text()
            case 9:
                inner, count = int(self.take("I")), int(self.take("Q"))
                return [self.value(inner) for _ in range(count)]
        raise AssertionError(kind)


def read(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    reader = Reader(path.read_bytes())
    assert reader.raw[:4] == b"GGUF"
    reader.at = 4
    assert reader.take("I") == 3
    num_tensors, num_fields = int(reader.take("Q")), int(reader.take("Q"))
    fields = {reader.text(): reader.value(int(reader.take("I"))) for _ in range(num_fields)}
    places = {}
    for _ in range(num_tensors):
        name = reader.text()
        sizes = [int(reader.take("Q")) for _ in range(int(reader.take("I")))]
        places[name] = (sizes, int(reader.take("I")), int(reader.take("Q")))
    start = -(-reader.at // 32) * 32
    kinds = {0: torch.float32, 30: torch.bfloat16}
    tensors = {}
    for name, (sizes, kind, offset) in places.items():
        assert offset % 32 == 0
        count = torch.Size(sizes).numel()
        flat = torch.frombuffer(bytearray(reader.raw), dtype=kinds[kind], count=count, offset=start + offset)
        tensors[name] = flat.view(*reversed(sizes))
    return fields, tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_comes_back(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path / "model", SMALL, 0)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "llama" and fields["llama.attention.head_count_kv"] == 2
    tokens = fields["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(set(tokens)) == 320 and tokens[0] == "<|end|>"
    assert len(tensors) == len(list(SMALL.tensors()))
    embedding = random_tensor("model.embed_tokens.weight", (320, 32), 0)
    assert torch.equal(tensors["token_embd.weight"].to(torch.bfloat16), embedding)
    down = random_tensor("model.layers.0.mlp.down_proj.weight", (32, 48), 0)
    assert torch.equal(tensors["blk.0.ffn_down.weight"].to(torch.bfloat16), down)
    assert tensors["blk.0.ffn_norm.weight"].dtype == torch.float32
    assert tensors["output.weight"].dtype == getattr(torch, dtype)


def test_rotated_pairs_become_neighbours() -> None:
    rows = torch.arange(12.0).view(12, 1)  # two heads of 6: pairs are (0, 3), (1, 4), (2, 5)
    assert rotated_pairs(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_other_models_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", replace(SMALL, architecture="Qwen3ForCausalLM"), 0)
    with pytest.raises(ConfigError, match="only a Llama"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "float32")
