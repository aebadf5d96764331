"""The one face behind which a batch is executed: by a model on some device, or by a cost model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from worker.batch import Batch, Transfer, TransferEnd


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the engine and the routers need to know of a model. `fingerprint` is 16 bytes over everything KV depends on:
    configuration, weights, KV dtype, rope settings (block size is added by `kvstore.block_key`). With a `window`, the
    query at position p reads positions from p - window + 1 on and the first `sinks` in any layer, and none between."""

    name: str
    fingerprint: bytes
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    block_size: int
    window: int | None = None
    sinks: int = 0


class BlockMover(Protocol):
    """KV blocks in CPU memory, and copies to and from them beside the steps. For the runner's thread; never waits."""

    num_blocks: int
    payload_format: str
    """What a payload's bytes mean, but for the model: workers with the same name may exchange payloads."""

    @property
    def largest_error(self) -> float:
        """How much a block has come back wrong, of those looked at: the norm of the difference over its own norm."""
        ...

    def read(self, block_id: int) -> bytes | None:
        """The payload of a CPU block that is held, None if it is not what was demoted. From any thread."""
        ...

    def write(self, block_id: int, payload: bytes) -> Future[bool]:
        """Fill a CPU block that is held, after all wipes said so far; False if that is no payload. From any thread."""
        ...

    def wipe(self, block_ids: Sequence[int]) -> None:
        """Overwrite these CPU blocks, which hold nothing any more; called before transfers that use them again."""
        ...

    def start(self, transfers: Sequence[Transfer]) -> None:
        """Begin these copies: a DEMOTE reads what the steps executed so far have written."""
        ...

    def take_ended(self) -> list[TransferEnd]:
        """Transfers that ended since the last call; the payload of a PROMOTE is there for the next step."""
        ...


class StepInFlight(Protocol):
    """A launched step. For the thread that launched it."""

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after so long at most."""
        ...

    def tokens(self) -> list[int]:
        """Wait for its end: the answer of `execute`, or what the step raised. Asked once, of one step after another."""
        ...


class Runner(Protocol):
    """Executes batches one after the other, for one thread."""

    spec: ModelSpec

    @property
    def runs_beside(self) -> bool:
        """Whether a launched step leaves the CPU to its caller, so that launching early pays."""
        ...

    @property
    def mover(self) -> BlockMover | None:
        """The CPU tier's memory, if there is one."""
        ...

    def execute(self, batch: Batch) -> list[int]:
        """Run the step; one token id for each draw of each sequence, in batch order."""
        ...

    def launch(self, batch: Batch) -> StepInFlight:
        """Have the step run behind those launched before, and return at once; the batch's tables are read by then.

        A share that `follows` gets its token from the step launched before this one. If that one failed, what is
        computed for the share is nothing, and the step goes on for the others.
        """
        ...

    def close(self) -> None:
        """Free device memory."""
        ...
