"""`python -m bench.engine make|alone|overlap|deterministic|profile|workload|facts`: checkpoints, the engine, and peers.

All but `workload` need neither Ray nor Redis. `workload` starts Redis, a router and a worker as processes for our own
row; where there is no Redis, it says so and ends with code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.engine import facts, facts_page
from bench.engine.alone import BATCHES, measure_alone
from bench.engine.checkpoints import SHAPES, checkpoint
from bench.engine.deterministic import measure_cost
from bench.engine.machine import Machine, measure_machine, processor
from bench.engine.overlap import measure_overlap
from bench.engine.profile import PARTS, Profile, measure_profile
from bench.engine.roofline import Model, bounds
from bench.engine.scenario import SCENARIO, read_scenario
from bench.engine.tables import markdown, number
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker.models.config import read_config

PROG = "python -m bench.engine"
LARGE = "llama-3.1-8b"
"""KV bytes are given of this shape too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; 2 for a setting that cannot be used."""
    arguments = _parser().parse_args(argv)
    try:
        figures: dict[str, Any] = arguments.run(arguments)
    except ConfigError as error:
        print(f"{PROG}: {error.message}", file=sys.stderr)
        return 2
    if getattr(arguments, "json", None):
        _write(arguments.json, figures)
    return 0


def _write(path: Path, figures: dict[str, Any]) -> None:
    _replace(path, json.dumps(figures, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """All at once: whoever is stopped meanwhile leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.rename(path)


def _make(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = checkpoint(arguments.shape, seed=arguments.seed, folder=arguments.folder)
    print(folder)
    return {"folder": str(folder)}


def _alone(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = _worker(arguments)
    machine = _machine(settings)
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


def _overlap(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = replace(_worker(arguments), runner=arguments.runner, simulated_step_ms=arguments.simulated_step_ms)
    found = measure_overlap(settings, arguments.batches, arguments.rounds)
    body = [
        [
            str(one.batch),
            *(number(us, 0) for us in (one.lockstep_us, one.overlap_us, one.host_us)),
            f"{one.hidden:.0%}",
            f"{one.ratio:.3f}",
            f"{one.ttft_ratio:.3f}",
        ]
        for one in found
    ]
    head = ["batch", "us a step in lockstep", "overlapped", "of them the host's", "hidden", "tokens/s", "first token"]
    print(markdown(head, body))
    return {"model": settings.model, "figures": [asdict(one) for one in found]}


def _deterministic(arguments: argparse.Namespace) -> dict[str, Any]:
    found = measure_cost(_worker(arguments), prefill_tokens=arguments.prefill, rounds=arguments.rounds)
    body = [[cost.work, number(cost.off, 1), number(cost.on, 1), f"{cost.ratio:.2f}"] for cost in found]
    print(markdown(["tokens/s", "off", "on", "on / off"], body))
    print(f"the fastest of {arguments.rounds} rounds each, in turns, load average {os.getloadavg()[0]:.1f}")
    return {"model": arguments.model, "dtype": arguments.dtype, "costs": [asdict(cost) for cost in found]}


def _workload(arguments: argparse.Namespace) -> dict[str, Any]:
    # Redis, gRPC and HTTP are needed here alone.
    from bench.engine.comparison import Contest, PeerOptions, Results, compare
    from bench.engine.report import document, text
    from bench.engine.systems import serving_for

    scenario = read_scenario(arguments.scenario)
    settings = _worker(arguments)
    config = read_config(Path(settings.model))
    limits = bounds(Model(config, getattr(torch, settings.dtype).itemsize), scenario)
    about = {"model": Path(settings.model).name, "dtype": settings.dtype, "threads": settings.threads}
    title = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in (about | asdict(scenario)).items())
    about |= {"processor": processor(), "torch": torch.__version__, "scenario": asdict(scenario)}

    def on_round(results: Results) -> None:
        if arguments.json:
            _write(arguments.json, document(results, limits, about))
            _replace(arguments.json.with_suffix(".md"), text(results, limits, title))
        else:
            print(text(results, limits, title), flush=True)

    contest = Contest(scenario, config.vocab_size, arguments.rounds, lambda: _rates(settings), _say, on_round)
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="pando-bench-logs-"))
    peers = PeerOptions(
        dict(_named(one) for one in arguments.peer), arguments.vllm_python, arguments.vllm_preload,
        arguments.llama_server, arguments.transformers, logs,
    )  # fmt: skip
    with _ended_by_sigterm():
        results = compare(serving_for(settings, scenario), settings, peers, contest)
    if arguments.json:
        print(text(results, limits, title))
    return document(results, limits, about)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C: what was begun is ended, and the logs are kept."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _profile(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = _worker(arguments)
    machine = _machine(settings)
    found = measure_profile(settings, read_scenario(arguments.scenario))
    head = ["part", *(cell for one in found for cell in (f"{one.name}: ms a step", "share"))]
    body = [
        [part, *(cell for one in found for cell in (number(one.parts_ms[part], 3), _share(one, part)))]
        for part in PARTS
    ]
    body.append(["all of a step", *(cell for one in found for cell in (number(one.wall_ms, 3), ""))])
    body.append(["without timers", *(cell for one in found for cell in (number(one.untimed_ms, 3), ""))])
    body.append(["steps", *(cell for one in found for cell in (str(one.steps), ""))])
    print(markdown(head, body))
    return {"machine": asdict(machine), "model": settings.model, "profiles": [asdict(one) for one in found]}


def _share(one: Profile, part: str) -> str:
    return f"{one.parts_ms[part] / one.wall_ms:.1%}"


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = _worker(arguments)
    loads = [facts.drawn_load()]
    loads += [facts.trace_load(path, arguments.trace_block_size) for path in arguments.trace]
    machine = _machine(settings)
    document = {
        "model": Path(settings.model).name,
        "device": settings.device,
        "machine": asdict(machine),
        "token_times": [asdict(one) for one in facts.token_times(settings, arguments.lengths, say=_say)],
        "loads": [facts.load_facts(load, say=_say) for load in loads],
        "kv_bytes": [
            {"model": name, "dtypes": [asdict(one) for one in facts.kv_bytes(config)]}
            for name, config in (
                (Path(settings.model).name, read_config(Path(settings.model))),
                (LARGE, facts.shape_config(SHAPES[LARGE])),
            )
        ],
    }
    print("\n\n".join(facts_page.text(document)))
    if arguments.plots:
        for name, drawn in facts_page.plots(document).items():
            (arguments.plots / name).write_text(drawn, "utf-8")
    return document


def _worker(arguments: argparse.Namespace) -> WorkerSettings:
    """The model is a shape's name, made where it is not there yet, or a folder."""
    known = arguments.model in SHAPES
    folder = checkpoint(arguments.model, folder=arguments.folder) if known else Path(arguments.model)
    return WorkerSettings(
        model=str(folder), device=arguments.device, dtype=arguments.dtype, threads=arguments.threads,
        max_batch_tokens=arguments.max_batch_tokens, block_size=arguments.block_size,
    )  # fmt: skip


def _rates(settings: WorkerSettings) -> Machine:
    return measure_machine(settings.device, getattr(torch, settings.dtype), settings.threads)


def _machine(settings: WorkerSettings) -> Machine:
    found = _rates(settings)
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
    overlap = commands.add_parser("overlap", help="decode in lockstep and with steps launched early, in turns")
    overlap.add_argument("--batches", type=_numbers, default=(1, 16), help="such as 1,8,16,64")
    overlap.add_argument("--rounds", type=int, default=7)
    overlap.add_argument("--runner", choices=("model", "simulated"), default="model")
    overlap.add_argument("--simulated-step-ms", type=float, default=5.0)
    overlap.set_defaults(run=_overlap)
    profile = commands.add_parser("profile", help="where the time of a step goes, on the CPU")
    profile.add_argument("--scenario", type=Path, default=SCENARIO, help="whose mixed steps")
    profile.set_defaults(run=_profile)
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
    figures.add_argument("--trace", type=Path, action="append", default=[], help="count sequences of this trace too")
    figures.add_argument("--trace-block-size", type=int, default=512, help="tokens of a hash id in the traces")
    figures.add_argument("--plots", type=Path, help="folder to write plots to")
    figures.set_defaults(run=_facts)
    for one in (alone, overlap, cost, profile, workload, figures):
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
