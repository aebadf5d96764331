"""A runner without a model: tokens from a hash, time from a cost model.

Knows no torch. It keeps the token ids of each block as its "KV" and reads all of them back through the block tables,
and the next token is a digest of all tokens before it: a slip in paging, sharing or order shows as another token.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker.batch import Batch, SamplingParams, ScheduledSequence
from worker.runner import BlockMover, ModelSpec
from worker.simulated_mover import NEVER_WRITTEN, SimulatedMover

DEFAULT_VOCAB_SIZE = 8192
DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_NUM_BLOCKS = 4096
ENDLESS = 1 << 30
"""The longest sequence with a window."""
MOVE_BLOCK_S = 2e-5
"""What a block takes between the tiers."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step takes: a fixed part and a part for each token."""

    step_s: float
    token_s: float

    def seconds(self, batch: Batch) -> float:
        """Duration of `batch` on the simulated device."""
        return self.step_s + batch.num_tokens * self.token_s


class SimulatedRunner:
    """Implements `Runner`. `sleep` and `clock` are passed in, so that a simulation can own time.

    `beside`: a runner whose blocks this one reads and writes too, where several simulated workers have one pool.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cost: StepCost,
        *,
        reserved_token_ids: frozenset[int] = frozenset(),
        num_cpu_blocks: int = 0,
        block_bytes: int = 0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        beside: SimulatedRunner | None = None,
    ) -> None:
        self.spec = spec
        self._cost = cost
        self._reserved = reserved_token_ids | set(spec.eos_token_ids)
        self._sleep = sleep
        self._clock = clock
        self._busy_until = float("-inf")
        self._drawn: list[int] = []  # the answer of the last launched step that ended
        # [num_blocks, block_size]
        self._blocks: npt.NDArray[np.uint32] = (
            np.full((spec.num_blocks, spec.block_size), NEVER_WRITTEN, np.uint32) if beside is None else beside._blocks
        )
        self.mover: BlockMover | None = None
        if num_cpu_blocks:
            self.mover = SimulatedMover(
                self._blocks, num_cpu_blocks, block_s=MOVE_BLOCK_S, payload_bytes=block_bytes, clock=clock
            )

    @property
    def runs_beside(self) -> bool:
        """As a device does: it only takes time."""
        return True

    def execute(self, batch: Batch) -> list[int]:
        """Write each share's tokens to its slots, then read each whole sequence back for its next token."""
        done_at = self._clock() + self._cost.seconds(batch)
        token_ids = self._compute(batch)
        self.sleep_until(done_at)
        return token_ids

    def launch(self, batch: Batch) -> SimulatedStep:
        """The step begins when the one before it ends. Nothing is written until its tokens are asked for, so that a
        block which is given away too early shows as another token."""
        self._busy_until = max(self._clock(), self._busy_until) + self._cost.seconds(batch)
        shares = tuple(replace(share, block_ids=tuple(share.block_ids)) for share in batch.sequences)
        return SimulatedStep(self, Batch(shares, batch.copies), self._busy_until)

    def sleep_until(self, at: float, most_s: float = float("inf")) -> bool:
        """Whether it is that late, after so long at most."""
        left = at - self._clock()
        if left > 0:
            self._sleep(min(left, most_s))
        return left <= most_s

    def answer(self, batch: Batch) -> list[int]:
        """What a launched step draws; the steps before it were asked."""
        before, self._drawn = self._drawn, []
        self._drawn = self._compute(Batch(tuple(_filled(share, before) for share in batch.sequences), batch.copies))
        return self._drawn

    def close(self) -> None:
        """Nothing to free."""

    def _compute(self, batch: Batch) -> list[int]:
        for copy in batch.copies:
            self._blocks[copy.target] = NEVER_WRITTEN
            self._blocks[copy.target, : copy.num_tokens] = self._blocks[copy.source, : copy.num_tokens]
        for share in batch.sequences:
            self._write(share)
        return [self._next_token(share, draw) for share in batch.sequences for draw in share.draws]

    def _write(self, share: ScheduledSequence) -> None:
        size = self.spec.block_size
        tokens = np.frombuffer(share.token_ids, dtype=np.uint32)
        position = share.start
        while len(tokens):
            offset = position % size
            part = tokens[: size - offset]
            self._blocks[share.block_ids[position // size], offset : offset + len(part)] = part
            position += len(part)
            tokens = tokens[len(part) :]

    def _read(self, share: ScheduledSequence) -> bytes:
        """The tokens that the last one of the share may look at: all, or its window and the sinks."""
        spec, num_tokens = self.spec, share.start + len(share.token_ids)
        table = np.array(share.block_ids[: -(-num_tokens // spec.block_size)], dtype=np.int64)
        tokens = self._blocks[table].reshape(-1)[:num_tokens]
        first = num_tokens - spec.window if spec.window is not None else 0
        if first <= spec.sinks:
            return tokens.tobytes()
        return tokens[: spec.sinks].tobytes() + tokens[first:].tobytes()

    def _next_token(self, share: ScheduledSequence, draw: SamplingParams) -> int:
        seed = draw.seed if draw.temperature > 0 else 0
        state = xxh3_64_intdigest(self._read(share), seed)
        for _ in range(4 * self.spec.vocab_size):
            token_id = state % self.spec.vocab_size
            if token_id not in self._reserved and token_id not in share.banned_token_ids:
                return token_id
            state = xxh3_64_intdigest(state.to_bytes(8, "little"), seed)
        raise ValueError("no token of the vocabulary may be drawn")


class SimulatedStep:
    """Implements `StepInFlight`."""

    def __init__(self, runner: SimulatedRunner, batch: Batch, ends_at: float) -> None:
        self._runner = runner
        self._batch = batch
        self._ends_at = ends_at

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the step has ended, so long at most."""
        return self._runner.sleep_until(self._ends_at, max(0.0, timeout_s))

    def tokens(self) -> list[int]:
        """Sleep until the step has ended, and carry it out."""
        self._runner.sleep_until(self._ends_at)
        return self._runner.answer(self._batch)


def _filled(share: ScheduledSequence, drawn: list[int]) -> ScheduledSequence:
    """With the token that it follows; of a step that failed there is none, and nobody reads what comes of another."""
    if share.follows is None or share.follows >= len(drawn):
        return share
    return replace(share, token_ids=array("I", [drawn[share.follows]]))


def load_simulated_runner(settings: WorkerSettings) -> SimulatedRunner:
    """A runner for the model that the settings name, without its weights; raises `ConfigError` on a bad model folder.

    Vocabulary, special tokens and length come from the folder, so that the text side works; from defaults where the
    model is not on this machine.
    """
    folder = _model_folder(settings.model)
    config = _read_json(folder / "config.json") if folder else {}
    name = Path(settings.model).resolve().name if Path(settings.model).is_dir() else settings.model
    vocab_size = int(config.get("vocab_size", DEFAULT_VOCAB_SIZE))
    spec = ModelSpec(
        name=name,
        fingerprint=_fingerprint(name, vocab_size, settings.window, settings.sinks),
        vocab_size=vocab_size,
        max_model_len=_max_model_len(settings, config),
        eos_token_ids=_eos_token_ids(folder, config),
        num_blocks=settings.device_blocks or DEFAULT_NUM_BLOCKS,
        block_size=settings.block_size,
        window=settings.window or None,
        sinks=settings.sinks,
    )
    cost = StepCost(settings.simulated_step_ms / 1e3, 1.0 / max(settings.simulated_prefill_tokens_per_s, 1e-9))
    reserved = _special_token_ids(folder, config)
    return SimulatedRunner(
        spec,
        cost,
        reserved_token_ids=reserved,
        num_cpu_blocks=settings.cpu_blocks,
        block_bytes=settings.simulated_block_bytes,
    )


def _model_folder(name: str) -> Path | None:
    """The folder of a model that is on this machine; nothing is downloaded for a simulation."""
    if name == "pando-tiny" or Path(name).is_dir():
        from pando.model_folder import resolve_model

        return resolve_model(name)
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"there is no model folder {name}")
    return None


def _max_model_len(settings: WorkerSettings, config: dict[str, Any]) -> int:
    own = int(config.get("max_position_embeddings", DEFAULT_MAX_MODEL_LEN))
    if settings.window:
        return settings.max_model_len or ENDLESS
    if settings.max_model_len > own:
        raise ConfigError(f"--max-model-len {settings.max_model_len} is over the model's own {own}")
    return settings.max_model_len or own


def _eos_token_ids(folder: Path | None, config: dict[str, Any]) -> tuple[int, ...]:
    found = _token_ids(config, "eos_token_id")
    if folder is not None and (folder / "generation_config.json").exists():
        found += _token_ids(_read_json(folder / "generation_config.json"), "eos_token_id")
    return tuple(dict.fromkeys(found))


def _special_token_ids(folder: Path | None, config: dict[str, Any]) -> frozenset[int]:
    found = {i for name in ("bos_token_id", "pad_token_id") for i in _token_ids(config, name)}
    if folder is not None and (folder / "tokenizer.json").exists():
        added = _read_json(folder / "tokenizer.json").get("added_tokens", [])
        found |= {int(token["id"]) for token in added if token.get("special")}
    return frozenset(found)


def _token_ids(config: dict[str, Any], name: str) -> list[int]:
    value = config.get(name)
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no JSON object")
    return content


def _fingerprint(name: str, vocab_size: int, window: int, sinks: int) -> bytes:
    message = json.dumps(["simulated", name, vocab_size, window, sinks]).encode()
    return hashlib.blake2b(message, digest_size=16, person=b"pando.simulated").digest()
