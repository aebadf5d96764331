"""The one face behind which a batch is executed: by a model on some device, or by a cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from worker.batch import Batch


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the engine and the routers need to know of a model. `fingerprint` is 16 bytes over everything KV depends on:
    configuration, weights, KV dtype, rope settings (block size is added by `kvstore.block_key`)."""

    name: str
    fingerprint: bytes
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    block_size: int


class Runner(Protocol):
    """Executes batches one after the other, from one thread."""

    spec: ModelSpec

    def execute(self, batch: Batch) -> list[int]:
        """Run the step; one token id for each sequence that has `sampling`, in batch order."""
        ...

    def close(self) -> None:
        """Free device memory."""
        ...
