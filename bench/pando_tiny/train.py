"""Makes the checkpoint `pando-tiny`: `python -m bench.pando_tiny.train --out FOLDER`.

Gathers text, trains a tokenizer and a small Llama on the CPU, writes the folder, then checks what it wrote.
With --steps the learning rate follows the steps; with --minutes it follows the clock, and ends in time.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from bench.pando_tiny import checkpoint, checks
from bench.pando_tiny.corpus import END_OF_TEXT, STANDARD_LIBRARY, Document, gather
from bench.pando_tiny.model import Llama, Shape
from pando.errors import ConfigError

VOCAB_SIZE = 2048
_STEP_TOKENS = 2048
_SHORT, _MIDDLE = 256, 512
_LONG = (2048, 8192, 4096)
_EXTENDING = (512, 1024, 2048, 4096, 512, 1024, 2048, 8192)
_LAST_RATE = 0.02  # of the peak
_MUON_RATE = 2.0  # times the rate of AdamW
_HELD_OUT = 50  # one document in this many is kept from training
_FEWEST_TOKENS = 1000
_REPORT_S = 10.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Learning rate and kind of sequences: from nothing, or from a checkpoint that is to learn longer ones."""

    peak_rate: float
    warmup_steps: int
    extending: bool


FROM_NOTHING = Stage(5e-3, 60, extending=False)
FROM_CHECKPOINT = Stage(1e-3, 20, extending=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for; exactly one of `minutes` and `steps` is set."""

    out: Path
    library: Path
    tokenizer: Path | None
    minutes: float | None
    steps: int | None
    threads: int
    seed: int
    precision: str
    start: Path | None

    @property
    def stage(self) -> Stage:
        return FROM_NOTHING if self.start is None else FROM_CHECKPOINT


@dataclass(frozen=True, slots=True)
class Streams:
    """Token ids of all documents, each followed by the end-of-text token, in shuffled order."""

    training: Tensor
    held_out: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on the standard error for what cannot be done."""
    try:
        run(parse(argv))
    except ConfigError as error:
        print(f"train: error: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


def run(plan: Plan) -> None:
    """The whole way from text to a checked folder."""
    checkpoint.prepare(plan.out)
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    documents = gather(plan.library, plan.seed)
    tokenizer = _tokenizer(plan, documents)
    model, before = _model(plan, tokenizer), _record_of(plan.start)
    streams = tokenize(documents, tokenizer, plan.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(documents):,} documents, {len(streams.training):,} training tokens, {parameters:,} parameters")
    bfloat16 = faster_in_bfloat16(model) if plan.precision == "auto" else plan.precision == "bfloat16"
    print(f"training in {'bfloat16 autocast' if bfloat16 else 'float32'} on {plan.threads} threads", flush=True)
    steps, seconds = train(model, streams.training, plan, bfloat16)
    record: dict[str, object] = {
        "steps": steps,
        "seconds": round(seconds),
        "parameters": parameters,
        "training_tokens": len(streams.training),
        "seed": plan.seed,
        "before": before,
        "precision": "bfloat16 autocast" if bfloat16 else "float32",
        "shape": asdict(model.shape),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    checkpoint.write(plan.out, model, tokenizer, record)
    written, tokenizer = checkpoint.read(plan.out)
    record["loss_by_position"] = {
        "held_out": checks.loss_by_position(written, streams.held_out),
        "training": checks.loss_by_position(written, streams.training),
    }
    checkpoint.write(plan.out, written, tokenizer, record)
    report(plan.out, written, tokenizer, record)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, seed: int) -> Streams:
    """Shuffle, set some documents aside, and lay the rest end to end."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = [[*encoding.ids, end] for encoding in tokenizer.encode_batch([d.text for d in documents])]
    order = np.random.default_rng(seed).permutation(len(encoded))
    parts: tuple[list[int], list[int]] = ([], [])
    for place, index in enumerate(order):
        parts[place % _HELD_OUT == 0 and len(encoded) >= _HELD_OUT].extend(encoded[index])
    training, held_out = (torch.tensor(part, dtype=torch.int32) for part in parts)
    if len(training) < _FEWEST_TOKENS:
        raise ConfigError(f"the corpus has {len(training)} tokens, fewer than {_FEWEST_TOKENS}")
    return Streams(training, held_out if len(held_out) > 1 else training)


def train(model: Llama, stream: Tensor, plan: Plan, bfloat16: bool) -> tuple[int, float]:
    """Train until the plan's steps or minutes are used up; returns steps and seconds."""
    optimizers = _optimizers(model)
    choose = torch.Generator().manual_seed(plan.seed)
    progress = Progress(plan, time.monotonic)
    step = 0
    while (done := progress.fraction(step)) < 1.0:
        rate = learning_rate(plan.stage, step, done)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["relative_rate"]
        inputs, targets = sample(stream, sequence_length(plan.stage, step, done), choose)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        progress.show(step, loss.item(), inputs.numel())
    return step, progress.elapsed()


def learning_rate(stage: Stage, step: int, done: float) -> float:
    """Warm-up, then a cosine from the peak down to its fiftieth at `done` = 1."""
    cosine = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
    return stage.peak_rate * cosine * min(1.0, (step + 1) / stage.warmup_steps)


def sequence_length(stage: Stage, step: int, done: float) -> int:
    """Short sequences first, longer ones later, and now and then the longest, more often near the end."""
    if stage.extending:
        return _EXTENDING[step % len(_EXTENDING)]
    every = 60 if done < 0.85 else 12
    if done >= 0.3 and step % every == 0:
        return _LONG[(step // every) % len(_LONG)]
    return _SHORT if done < 0.8 else _MIDDLE


def sample(stream: Tensor, length: int, choose: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of the stream and the same windows one token on: [batch, length] each."""
    length = min(length, len(stream) - 1)
    batch = max(1, _STEP_TOKENS // length)
    starts = torch.randint(0, len(stream) - length, (batch, 1), generator=choose)
    windows = stream[starts + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def faster_in_bfloat16(model: Llama) -> bool:
    """Time forward and backward both ways on this CPU; few have bfloat16 arithmetic worth using."""
    ids = torch.randint(0, model.shape.vocab_size, (_STEP_TOKENS // _SHORT, _SHORT))
    best = {True: math.inf, False: math.inf}
    for trial in range(10):
        enabled = trial % 2 == 0
        start = time.monotonic()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(ids)
        logits.float().logsumexp(-1).mean().backward()
        model.zero_grad()
        if trial > 1:
            best[enabled] = min(best[enabled], time.monotonic() - start)
    return best[True] < best[False]


class Progress:
    """How far the run is, and a line about it every few seconds."""

    def __init__(self, plan: Plan, clock: Callable[[], float]) -> None:
        self._plan, self._clock = plan, clock
        self._start = self._shown = clock()
        self._tokens, self._loss = 0, 0.0

    def elapsed(self) -> float:
        return self._clock() - self._start

    def fraction(self, step: int) -> float:
        if self._plan.steps is not None:
            return step / self._plan.steps
        assert self._plan.minutes is not None
        return self.elapsed() / (self._plan.minutes * 60)

    def show(self, step: int, loss: float, tokens: int) -> None:
        self._tokens += tokens
        self._loss = loss if step == 1 else 0.98 * self._loss + 0.02 * loss
        now, done = self._clock(), self.fraction(step)
        if now - self._shown < _REPORT_S and done < 1.0:
            return
        left = self.elapsed() * (1 - done) / max(done, 1e-6)
        rate = self._tokens / max(now - self._shown, 1e-6)
        print(f"step {step:6,}  loss {self._loss:6.3f}  {rate:7,.0f} tokens/s  {max(left, 0):5.0f} s left", flush=True)
        self._shown, self._tokens = now, 0


def report(folder: Path, model: Llama, tokenizer: Tokenizer, record: dict[str, object]) -> None:
    """Print what the checks say of the written folder."""
    print(f"wrote {folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")
    print(f"loss by position: {record['loss_by_position']}")
    samples = [checks.greedy(model, tokenizer, prompt, 60) for prompt in checks.PROMPTS]
    for sampled in samples:
        print(f"--- {sampled.prompt!r}\n{sampled.text}")
    print(f"greedy steps decided by less than 0.001: {checks.close_calls(samples, 1e-3):.2%}")
    difference = checks.oracle_difference(folder, model, tokenizer)
    if difference is None:
        print("transformers is not installed: logits not compared")
    else:
        print(f"largest logit difference to transformers in float32: {difference:.2e}")


def parse(argv: Sequence[str] | None) -> Plan:
    """The command line; `ConfigError` on what it does not allow."""
    parser = _Parser(prog="python -m bench.pando_tiny.train", description=__doc__, formatter_class=_Help)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; it may hold an earlier checkpoint")
    add("--minutes", type=float, help="train for this long (35 when neither this nor --steps is given)")
    add("--steps", type=int, help="train for this many steps instead; repeatable on one machine")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--seed", type=int, default=0, help="seed of weights, order and sampling")
    add("--library", type=Path, default=STANDARD_LIBRARY, help="folder of Python sources to learn from")
    add("--tokenizer", type=Path, help="folder of a checkpoint whose tokenizer is kept; otherwise one is trained")
    add("--start", type=Path, help="folder of our own checkpoint to go on from, with longer sequences")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto measures which is faster")
    given = parser.parse_args(argv)
    if given.minutes is not None and given.steps is not None:
        raise ConfigError("give --minutes or --steps, not both")
    if given.minutes is None and given.steps is None:
        given.minutes = 35.0
    for name in ("minutes", "steps", "threads"):
        if getattr(given, name) is not None and not 0 < getattr(given, name) < math.inf:
            raise ConfigError(f"--{name} must be more than 0")
    if given.start is not None and given.tokenizer is not None:
        raise ConfigError("give --start or --tokenizer, not both")
    if not given.library.is_dir():
        raise ConfigError(f"no folder {given.library}")
    return Plan(**vars(given))


def _model(plan: Plan, tokenizer: Tokenizer) -> Llama:
    if plan.start is None:
        return Llama(Shape(vocab_size=tokenizer.get_vocab_size()))
    return checkpoint.read(plan.start)[0].train()


def _record_of(start: Path | None) -> object:
    """How the checkpoint that this run began with was trained, where it says."""
    if start is None or not (start / "training.json").is_file():
        return None
    try:
        return json.loads((start / "training.json").read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{start / 'training.json'} is not JSON") from error


def _tokenizer(plan: Plan, documents: Sequence[Document]) -> Tokenizer:
    kept = plan.start or plan.tokenizer
    if kept is not None:
        return checkpoint.read_tokenizer(kept)
    return checkpoint.train_tokenizer((document.text for document in documents), VOCAB_SIZE)


def _optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """AdamW for embedding and norms; Muon for the layers' matrices, where it learns more from the same tokens."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = [{"params": matrices, "relative_rate": _MUON_RATE}]
    adamw = [{"params": rest, "relative_rate": 1.0}]
    return [
        torch.optim.Muon(muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, the description left as written."""


class _Parser(argparse.ArgumentParser):
    """Leaves the one line about an error to `main`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


if __name__ == "__main__":
    sys.exit(main())
