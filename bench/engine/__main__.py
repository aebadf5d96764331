"""`python -m bench.engine make|alone`: checkpoints of random weights, and the engine's figures in this process.

Needs neither Ray nor Redis.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.engine.alone import BATCHES, measure_alone
from bench.engine.checkpoints import SHAPES, checkpoint
from bench.engine.machine import Machine, measure_machine
from bench.engine.tables import markdown, number
from pando.errors import ConfigError
from pando.settings import WorkerSettings

PROG = "python -m bench.engine"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; 2 for a setting that cannot be used."""
    arguments = _parser().parse_args(argv)
    try:
        figures: dict[str, Any] = arguments.run(arguments)
    except ConfigError as error:
        print(f"{PROG}: {error.message}", file=sys.stderr)
        return 2
    if getattr(arguments, "json", None):
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


def _make(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = checkpoint(arguments.shape, seed=arguments.seed, folder=arguments.folder)
    print(folder)
    return {"folder": str(folder)}


def _alone(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = _worker(arguments)
    machine = _machine(arguments)
    found = measure_alone(settings, machine, arguments.batches)
    print(f"prefill of 4,096 tokens: {found.prefill_tokens_per_s:,.0f} tokens/s, {found.mfu:.1%} of the matmul rate\n")
    body = [
        [
            str(one.batch),
            number(one.tokens_per_s, 1),
            number(one.bound_tokens_per_s, 1),
            f"{one.tokens_per_s / one.bound_tokens_per_s:.0%}",
            number(one.host_us, 0),
        ]
        for one in found.decode
    ]
    print(markdown(["batch", "decode tokens/s", "bandwidth bound", "of it", "us of the engine a step"], body))
    return {"machine": asdict(machine), "model": settings.model, **asdict(found)}


def _worker(arguments: argparse.Namespace) -> WorkerSettings:
    """The model is a shape's name, made where it is not there yet, or a folder."""
    known = arguments.model in SHAPES
    folder = checkpoint(arguments.model, folder=arguments.folder) if known else Path(arguments.model)
    return WorkerSettings(
        model=str(folder), device=arguments.device, dtype=arguments.dtype, threads=arguments.threads,
        max_batch_tokens=arguments.max_batch_tokens, block_size=arguments.block_size,
    )  # fmt: skip


def _machine(arguments: argparse.Namespace) -> Machine:
    found = measure_machine(arguments.device, getattr(torch, arguments.dtype), arguments.threads)
    print(
        f"{found.name}, {found.threads} threads, torch {found.torch_version}, {found.dtype}: "
        f"{found.read_gb_s:,.1f} GB/s, matmul {found.matmul_gflop_s:,.0f} GFLOP/s, "
        f"load average {found.load_average:.1f}",
        flush=True,
    )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make", help="make a checkpoint of random weights and print its folder")
    make.add_argument("shape", choices=tuple(SHAPES))
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--folder", type=Path, help="keep checkpoints there instead of in the cache")
    make.set_defaults(run=_make)
    alone = commands.add_parser("alone", help="prefill and decode of the engine in this process")
    alone.add_argument("--batches", type=_numbers, default=BATCHES, help="such as 1,8,16,64")
    alone.set_defaults(run=_alone)
    _model_options(alone)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-40m", help=f"{', '.join(SHAPES)}, or a model folder")
    parser.add_argument("--folder", type=Path, help="where made checkpoints are kept")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the CPU, for all systems")
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write all figures there")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
