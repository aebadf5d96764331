"""A driver that feeds a model runner block by block, as a scheduler would, but by hand and in shuffled order."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pando.settings import WorkerSettings
from worker.batch import Batch, SamplingParams, ScheduledSequence
from worker.model_runner import ModelRunner, load_model_runner


def load(model: str | Path, **settings: Any) -> ModelRunner:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "device_blocks": 160,
        "block_size": 8,
        "threads": 1,
    }
    return load_model_runner(WorkerSettings(model=str(model), **(defaults | settings)))


def random_tokens(count: int, seed: int, vocab_size: int = 1031) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocab_size) for _ in range(count)]


@dataclass
class Driven:
    """A sequence as a scheduler would hold it."""

    number: int
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class Driver:
    """Feeds a runner and hands out its blocks in shuffled order."""

    def __init__(self, runner: ModelRunner, seed: int = 0) -> None:
        self.runner = runner
        self.free = list(range(runner.spec.num_blocks))
        random.Random(seed).shuffle(self.free)
        self.started = 0

    def start(self, tokens: Sequence[int], *, prefix: Driven | None = None, cached: int = 0) -> Driven:
        """A new sequence; with `prefix`, its first `cached` tokens (full blocks) are those of another one."""
        self.started += 1
        driven = Driven(self.started, list(tokens))
        if prefix is not None:
            assert cached % self.runner.spec.block_size == 0
            assert prefix.tokens[:cached] == driven.tokens[:cached]
            driven.blocks = prefix.blocks[: cached // self.runner.spec.block_size]
            driven.computed = cached
        return driven

    def preempt(self, driven: Driven) -> None:
        """Take all blocks away."""
        self.free = driven.blocks + self.free
        driven.blocks, driven.computed = [], 0

    def share(
        self, driven: Driven, chunk: int | None = None, sampling: SamplingParams | None = None
    ) -> ScheduledSequence:
        """The next `chunk` tokens of a sequence as its share of a step; samples only where the chunk is its last."""
        end = len(driven.tokens) if chunk is None else min(driven.computed + chunk, len(driven.tokens))
        while len(driven.blocks) * self.runner.spec.block_size < end:
            driven.blocks.append(self.free.pop())
        scheduled = ScheduledSequence(
            sequence_id=driven.number,
            token_ids=array("I", driven.tokens[driven.computed : end]),
            start=driven.computed,
            block_ids=driven.blocks,
            sampling=(sampling or SamplingParams()) if end == len(driven.tokens) else None,
        )
        driven.computed = end
        return scheduled

    def step(
        self, sequences: Sequence[Driven], chunk: int | None = None, sampling: SamplingParams | None = None
    ) -> None:
        """One step of all these sequences; sampled tokens are appended to them."""
        shares = tuple(self.share(driven, chunk, sampling) for driven in sequences)
        sampled = self.runner.execute(Batch(shares))
        chosen = [driven for driven, share in zip(sequences, shares, strict=True) if share.sampling is not None]
        for driven, token in zip(chosen, sampled, strict=True):
            driven.tokens.append(token)

    def generate(self, sequences: Sequence[Driven], count: int, chunk: int | None = None) -> list[list[int]]:
        """Run all to `count` sampled tokens each, together."""
        ends = [len(driven.tokens) + count for driven in sequences]
        while live := [d for d, end in zip(sequences, ends, strict=True) if len(d.tokens) < end]:
            self.step(live, chunk)
        return [driven.tokens[-count:] for driven in sequences]

    def logits(self, driven: Driven, chunk: int | None = None) -> torch.Tensor:
        """Logits after every token not computed yet, in chunks."""
        parts = []
        while driven.computed < len(driven.tokens):
            parts.append(self.runner.logits(Batch((self.share(driven, chunk),))))
        return torch.cat(parts)
