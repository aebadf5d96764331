"""`python -m bench.engine make|alone|deterministic|workload|facts`: checkpoints, the engine's figures, with and without
deterministic mode, the workload beside peers.

All but `workload` need neither Ray nor Redis. `workload` starts Redis, a router and a worker as processes for our own
row; where there is no Redis, it says so and ends with code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.engine import facts
from bench.engine.alone import BATCHES, measure_alone
from bench.engine.checkpoints import SHAPES, checkpoint
from bench.engine.deterministic import measure_cost
from bench.engine.machine import Machine, measure_machine
from bench.engine.scenario import SCENARIO, read_scenario
from bench.engine.tables import comparison_table, markdown, number
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker.models.config import read_config

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


def _deterministic(arguments: argparse.Namespace) -> dict[str, Any]:
    found = measure_cost(_worker(arguments), prefill_tokens=arguments.prefill, rounds=arguments.rounds)
    body = [[cost.work, number(cost.off, 1), number(cost.on, 1), f"{cost.ratio:.2f}"] for cost in found]
    print(markdown(["tokens/s", "off", "on", "on / off"], body))
    print(f"the fastest of {arguments.rounds} rounds each, in turns, load average {os.getloadavg()[0]:.1f}")
    return {"model": arguments.model, "dtype": arguments.dtype, "costs": [asdict(cost) for cost in found]}


def _workload(arguments: argparse.Namespace) -> dict[str, Any]:
    # Redis, gRPC and HTTP are needed here alone.
    from bench.engine.comparison import PeerOptions, compare
    from bench.engine.systems import Serving

    scenario = read_scenario(arguments.scenario)
    settings = _worker(arguments)
    folder = Path(settings.model)
    machine = _machine(arguments)
    open_tokens = scenario.concurrency * (scenario.prompt_tokens + scenario.output_tokens + settings.block_size)
    length = max(scenario.prompt_tokens + scenario.output_tokens, 4096) + 64
    serving = Serving(
        folder, settings.dtype, settings.threads, scenario.concurrency,
        kv_tokens=max(2 * open_tokens, 2 * length), length=length, device=settings.device,
    )  # fmt: skip
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="pando-bench-peers-"))
    logs.mkdir(parents=True, exist_ok=True)
    peers = PeerOptions(
        urls=dict(_named(one) for one in arguments.peer),
        vllm_python=arguments.vllm_python,
        vllm_preload=arguments.vllm_preload,
        llama_server=arguments.llama_server,
        transformers=arguments.transformers,
        logs=logs,
    )
    rows, absent = compare(
        serving, settings, scenario, read_config(folder).vocab_size, peers, rounds=arguments.rounds, say=_say
    )
    found = [row.document() for row in rows]
    print(f"{scenario}, {arguments.rounds} rounds, medians\n")
    print(comparison_table(found))
    for line in [f"failed: {one['name']}: {one['failure']}" for one in found if one["failure"]]:
        print(line)
    for line in absent:
        print(f"absent: {line}")
    load = os.getloadavg()[0]
    return {
        "machine": asdict(machine),
        "load_after": load,
        "scenario": asdict(scenario),
        "rows": found,
        "absent": absent,
    }


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = _worker(arguments)
    times = facts.token_times(settings, arguments.lengths)
    body = [[f"{t.length:,}", number(t.with_cache_ms, 2), number(t.without_cache_ms, 2)] for t in times]
    print(markdown(["tokens before it", "ms a token with a cache", "without"], body) + "\n")
    sequences = [facts.concurrency(blocks) for blocks in facts.POOLS]
    body = [[f"{s.kv_tokens:,}", str(s.reserved), number(s.paged_mean, 1), str(s.paged_peak)] for s in sequences]
    print(markdown(["token positions", "sequences reserved", "paged, mean", "most"], body) + "\n")
    kinds = facts.kv_bytes(settings)
    body = [
        [k.dtype, number(k.bytes_per_token, 0), f"{k.bytes_per_token / kinds[0].bytes_per_token:.3f}"] for k in kinds
    ]
    print(markdown(["KV dtype", "bytes a token", "of float32"], body))
    if arguments.plot:
        title = f"Time for the next token: {Path(settings.model).name}, {settings.dtype}"
        arguments.plot.write_text(facts.draw_times(times, title), "utf-8")
    if arguments.plot_memory:
        arguments.plot_memory.write_text(facts.draw_concurrency(sequences), "utf-8")
    return {
        "token_times": [asdict(one) for one in times],
        "concurrency": [asdict(one) for one in sequences],
        "kv_bytes": [asdict(one) for one in kinds],
    }


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


def _named(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if name not in ("vllm", "llama.cpp") or not url.startswith("http"):
        raise ConfigError(f"--peer {text}: write vllm=http://... or llama.cpp=http://...")
    return name, url


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
    cost = commands.add_parser("deterministic", help="what deterministic mode costs, measured in turns")
    cost.add_argument("--rounds", type=int, default=5)
    cost.add_argument("--prefill", type=int, default=1024, help="tokens of the prompt")
    cost.set_defaults(run=_deterministic)
    workload = commands.add_parser("workload", help="the multi-tenant workload, ours and the peers that are there")
    workload.add_argument("--scenario", type=Path, default=SCENARIO)
    workload.add_argument("--rounds", type=int, default=3)
    workload.add_argument(
        "--peer", action="append", default=[], help="NAME=URL of a server that runs; vllm or llama.cpp"
    )
    workload.add_argument("--vllm-python", type=Path, help="start vLLM with this interpreter")
    workload.add_argument("--vllm-preload", default="", help="libraries for its LD_PRELOAD: tcmalloc and iomp")
    workload.add_argument("--llama-server", type=Path, help="start this llama.cpp server")
    workload.add_argument("--transformers", action="store_true", help="run transformers of this interpreter")
    workload.add_argument("--logs", type=Path, help="folder for what the peers say")
    workload.set_defaults(run=_workload)
    figures = commands.add_parser("facts", help="what a KV cache is worth")
    figures.add_argument("--lengths", type=_numbers, default=facts.LENGTHS)
    figures.add_argument("--plot", type=Path, help="SVG of the time for a token over length")
    figures.add_argument("--plot-memory", type=Path, help="SVG of sequences in the same bytes")
    figures.set_defaults(run=_facts)
    for one in (alone, cost, workload, figures):
        _model_options(one)
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
