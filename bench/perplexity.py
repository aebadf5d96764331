"""Perplexity of a long text under full attention, a window, and a window with sinks: `python -m bench.perplexity`.
With `--kv-dtype` under full attention over KV kept in each of these types, and what it takes.

Knows how to feed the real model runner by hand, in chunks and with as few KV blocks as each kind of attention may hold.
Every token is predicted exactly once, from all that its attention lets it see; nothing is sampled.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.chart import Line, line_chart
from bench.pando_tiny.checkpoint import read_tokenizer
from bench.pando_tiny.corpus import STANDARD_LIBRARY, gather
from bench.pando_tiny.train import tokenize
from pando.errors import ConfigError
from pando.model_folder import resolve_model
from pando.settings import WorkerSettings
from worker.batch import Batch, ScheduledSequence
from worker.model_runner import ModelRunner, load_model_runner
from worker.models.config import read_config

BLOCK_SIZE = 16
CHUNK = 256
# Positions of the table's columns; further ones double.
FIRST_BUCKET = 1024
# Tokens of a point of the plot.
STRIDE = 512


@dataclass(frozen=True, slots=True)
class Attention:
    """What a token sees: everything where `window` is 0."""

    name: str
    window: int = 0
    sinks: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Losses in nats of tokens 1, 2, ... given those before them."""

    attention: Attention
    losses: torch.Tensor
    most_blocks: int
    seconds: float

    def perplexity(self, first: int = 0, end: int | None = None) -> float:
        """Of the tokens predicted from positions [first, end)."""
        return math.exp(float(self.losses[first:end].mean()))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on the standard error for what cannot be done."""
    arguments = _parse(argv)
    try:
        folder = resolve_model(arguments.model)
        text = held_out(folder, arguments.tokens)
        trained = read_config(folder).max_positions
        if arguments.kv_dtype:
            print(_kv_types(arguments, text))
            return 0
        kinds = (
            Attention("full"),
            Attention(f"window {arguments.window + arguments.sinks}", arguments.window + arguments.sinks),
            Attention(f"window {arguments.window} + {arguments.sinks} sinks", arguments.window, arguments.sinks),
        )
        measured = [measure(arguments.model, kind, text, threads=arguments.threads) for kind in kinds]
    except ConfigError as error:
        print(f"perplexity: error: {error.message}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(summary(measured, trained)))
    else:
        print(table(measured, trained))
    if arguments.plot:
        Path(arguments.plot).write_text(plot(measured, trained), "utf-8")
    return 0


def _kv_types(arguments: argparse.Namespace, text: array[int]) -> str:
    from bench import kv_formats

    config = read_config(resolve_model(arguments.model))
    rows = []
    for name in arguments.kv_dtype.split(","):
        measured = measure(arguments.model, Attention("full"), text, threads=arguments.threads, kv_dtype=name)
        rows.append(kv_formats.kept(name, measured, config))
    return json.dumps(kv_formats.summary(rows)) if arguments.json else kv_formats.table(rows)


def held_out(folder: Path, count: int) -> array[int]:
    """The first `count` tokens of the documents that the built-in model was not trained on: they are the same ones only
    with the Python it was trained with. Whole documents follow each other, most of them shorter than a window."""
    record = folder / "training.json"
    seed = json.loads(record.read_bytes())["seed"] if record.is_file() else 0
    stream = tokenize(gather(STANDARD_LIBRARY, seed), read_tokenizer(folder), seed).held_out
    if len(stream) < count:
        raise ConfigError(f"the held-out text has {len(stream)} tokens, fewer than {count}")
    return array("I", stream[:count].tolist())


def measure(
    model: str, attention: Attention, text: array[int], *, threads: int = 1, kv_dtype: str = "auto"
) -> Measured:
    """Run the text through a runner whose pool holds what this attention keeps and one chunk, and no block more."""
    kept = len(text) if not attention.window else attention.window + attention.sinks + CHUNK + 2 * BLOCK_SIZE
    settings = WorkerSettings(
        model=model,
        device="cpu",
        dtype="float32",
        kv_dtype=kv_dtype,
        threads=threads,
        block_size=BLOCK_SIZE,
        device_blocks=-(-kept // BLOCK_SIZE),
        window=attention.window,
        sinks=attention.sinks,
    )
    runner = load_model_runner(settings)
    began = time.perf_counter()
    try:
        losses, most_blocks = _losses(runner, text)
    finally:
        runner.close()
    return Measured(attention, losses, most_blocks, time.perf_counter() - began)


def _losses(runner: ModelRunner, text: array[int]) -> tuple[torch.Tensor, int]:
    """The loss of each token but the first, and the most blocks held at once."""
    spec = runner.spec
    free = list(range(spec.num_blocks))
    block_ids: list[int] = []
    most_blocks = 0
    losses: list[torch.Tensor] = []
    for start in range(0, len(text) - 1, CHUNK):
        end = min(start + CHUNK, len(text) - 1)
        while len(block_ids) * spec.block_size < end:
            block_ids.append(free.pop())
        most_blocks = max(most_blocks, spec.num_blocks - len(free))
        share = ScheduledSequence(0, text[start:end], start, block_ids)
        logits = runner.logits(Batch((share,)))
        targets = torch.tensor(text[start + 1 : end + 1], dtype=torch.int64)
        losses.append(F.cross_entropy(logits, targets, reduction="none").double())
        if spec.window is not None:
            _leave(
                block_ids, free, range(-(-spec.sinks // spec.block_size), (end - spec.window + 1) // spec.block_size)
            )
    return torch.cat(losses), most_blocks


def _leave(block_ids: list[int], free: list[int], left: range) -> None:
    """Give back the blocks that left the window."""
    for index in left:
        if block_ids[index] >= 0:
            free.append(block_ids[index])
            block_ids[index] = -1


def buckets(count: int) -> list[tuple[int, int]]:
    """Ranges of positions: up to 1,024, then doubling, the last one cut."""
    found, first, end = [], 0, FIRST_BUCKET
    while first < count:
        found.append((first, min(end, count)))
        first, end = end, 2 * end
    return found


def table(measured: Sequence[Measured], trained: int) -> str:
    """Perplexity by position, in markdown."""
    ranges = buckets(len(measured[0].losses))
    names = [f"{first:,} to {end:,}" + (" *" if end > trained else "") for first, end in ranges]
    lines = [f"| attention | {' | '.join(names)} | all | KV blocks | tokens/s |", "|---" * (len(names) + 4) + "|"]
    for one in measured:
        cells = [f"{one.perplexity(first, end):.2f}" for first, end in ranges]
        rate = len(one.losses) / one.seconds
        cells += [f"{one.perplexity():.2f}", f"{one.most_blocks:,}", f"{rate:,.0f}"]
        lines.append(f"| {one.attention.name} | {' | '.join(cells)} |")
    if len(measured[0].losses) > trained:
        lines.append(f"\n\\* The model was trained on at most {trained:,} positions. Behind them full attention meets")
        lines.append("distances it has never seen; a window, with sinks or without, never meets one.")
    return "\n".join(lines)


def summary(measured: Sequence[Measured], trained: int) -> dict[str, object]:
    """All figures, for a machine."""
    return {
        "tokens": len(measured[0].losses),
        "trained_positions": trained,
        "attention": [
            asdict(one.attention)
            | {
                "perplexity": one.perplexity(),
                "by_position": {
                    f"{first}-{end}": one.perplexity(first, end) for first, end in buckets(len(one.losses))
                },
                "most_blocks": one.most_blocks,
                "seconds": one.seconds,
            }
            for one in measured
        ],
    }


def plot(measured: Sequence[Measured], trained: int) -> str:
    """Perplexity of each stretch of tokens, as SVG."""
    lines = []
    for one in measured:
        count = len(one.losses)
        points = [(min(p + STRIDE, count), one.perplexity(p, p + STRIDE)) for p in range(0, count, STRIDE)]
        lines.append(Line(one.attention.name, points))
    return line_chart(
        lines,
        title=f"Perplexity of held-out text, {STRIDE} tokens a point",
        x_label="position in the text",
        mark=(trained, f"{trained:,}: longest text in training"),
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.perplexity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="pando-tiny", help="the built-in model, or a folder made by its recipe")
    parser.add_argument("--tokens", type=int, default=16384, help="length of the text")
    parser.add_argument("--window", type=int, default=1024, help="last positions that are seen")
    parser.add_argument("--sinks", type=int, default=16, help="first positions that are seen beside the window")
    parser.add_argument("--kv-dtype", default="", help="types to keep KV in, with commas; bfloat16 is the base")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print figures for a machine instead of a table")
    parser.add_argument("--plot", default="", metavar="FILE.svg", help="write a plot")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
