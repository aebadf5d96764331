"""The safetensors files of a model folder: which tensors there are, their values, and a digest of the whole.

Knows files and names; what the names mean is the model's. Invariant: a tensor is read into memory that is its final
place, in the final dtype and on the final device, or the start fails with one `ConfigError`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pando.errors import ConfigError
from worker.models.config import ModelConfig

# Checkpoints up to this size are digested whole, larger ones by their headers and samples.
WHOLE_DIGEST_BYTES = 256 * 1024 * 1024
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 64 * 1024


class Checkpoint:
    """Open safetensors files, as a context manager. Tensors that nobody asked for are an error of `finish`."""

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._open = ExitStack()
        self._unread: set[str] = set()
        self._source: dict[str, Any] = {}
        for path in weight_files(folder):
            self._add(path)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.clear()
        self._open.close()

    def read(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """The named tensors, each of its given shape, joined along the first dimension."""
        total = sum(shape[0] for shape in shapes)
        joined = torch.empty((total, *shapes[0][1:]), dtype=self.dtype, device=self.device)
        first = 0
        for name, shape in zip(names, shapes, strict=True):
            joined[first : first + shape[0]].copy_(self._tensor(name, shape))
            first += shape[0]
        return joined

    def ignore(self, *names: str) -> None:
        """Tensors that may be there and are not needed."""
        self._unread.difference_update(names)

    def finish(self) -> None:
        """Raises `ConfigError` if the files hold tensors that were neither read nor ignored."""
        if self._unread:
            count, example = len(self._unread), min(self._unread)
            raise ConfigError(f"the checkpoint holds {count} tensors this model does not use, {example} among them")

    def _add(self, path: Path) -> None:
        try:
            file = self._open.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path.name} of the model folder is not a readable safetensors file") from error
        self._unread.update(names)
        self._source.update(dict.fromkeys(names, file))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        file = self._source.get(name)
        if file is None:
            raise ConfigError(f"the checkpoint has no tensor {name}")
        tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"tensor {name} has shape {list(tensor.shape)} where the config needs {list(shape)}")
        if not tensor.dtype.is_floating_point:
            raise ConfigError(f"tensor {name} is not of a floating-point type")
        self._unread.discard(name)
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those of the index where there is one, else `model.safetensors`."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise ConfigError("the model folder has no model.safetensors and no model.safetensors.index.json")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("model.safetensors.index.json of the model folder is not readable") from error
    for name in names:
        if Path(name).name != name or not (folder / name).exists():
            raise ConfigError(f"model.safetensors.index.json names {name}, which is not in the model folder")
    return [folder / name for name in names]


def fingerprint(folder: Path, config: ModelConfig, kv_dtype: str) -> bytes:
    """16 bytes that are equal iff two workers compute interchangeable KV: BLAKE2b over configuration, weights and
    KV dtype. Weights up to `WHOLE_DIGEST_BYTES` count in full, larger ones by headers, sizes and samples."""
    fields = asdict(config) | {"eos_token_ids": None, "dtype": None, "kv_dtype": kv_dtype}
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16, person=b"pando.model.v1")
    files = weight_files(folder)
    whole = sum(path.stat().st_size for path in files) <= WHOLE_DIGEST_BYTES
    for path in files:
        digest.update(_whole_digest(path) if whole else _sampled_digest(path))
    return digest.digest()


def _whole_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


def _sampled_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.blake2b(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header_bytes, size)))
        for sample in range(_SAMPLES_PER_FILE):
            file.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES_PER_FILE - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
