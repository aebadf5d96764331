"""`python -m bench.kernels [--quick] [--shapes D1,C2,S] [--sweep] [--alone] [--json FILE]`: on a CUDA device.

Each shape is checked against float32 before it is timed. Times are per layer, of graph replays over layers that
together are far larger than the cache. `of floor` is the time over the least that this device's measured copy and
matmul rates allow; `goal` is the same for the time to reach.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernels
from bench.kernels.peers import sdpa_microseconds
from bench.kernels.sampling import print_sampling
from bench.kernels.shapes import QUICK, SHAPES, Setting, Shape, make_setting
from bench.kernels.timing import Roofline, graph_microseconds, host_microseconds, measure_roofline
from kernels.configs import Processor, Tuning, tuning

MOST_ERROR = 1e-2
HEAD = f"{'shape':6}{'us':>9}{'of floor':>9}{'goal':>6}{'plain':>9}{'sdpa':>9}{'plan us':>9}{'error':>9}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("--shapes", default="", help="only these, separated by commas")
    parser.add_argument("--sweep", action="store_true", help="try the configurations worth trying instead")
    parser.add_argument("--alone", action="store_true", help="without torch's own attention beside it")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.kernels needs a CUDA device", file=sys.stderr)
        return 1
    names = options.shapes.split(",") if options.shapes else QUICK if options.quick else [s.name for s in SHAPES]
    roofline = measure_roofline()
    print(
        f"{roofline.device}: copy {roofline.copy / 1e6:.2f} TB/s, bf16 matmul {roofline.matmul / 1e6:.0f} TFLOP/s, "
        f"launch {roofline.launch:.2f} us, torch {torch.__version__}"
    )
    measure = _swept if options.sweep else partial(_timed, alone=options.alone)
    print("" if options.sweep else HEAD)
    figures: dict[str, Any] = {**asdict(roofline), "shapes": []}
    for shape in (shape for shape in SHAPES if shape.name in names):
        setting = make_setting(shape)
        figures["shapes"] += measure(setting, roofline)
        del setting
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))
    drawing = [] if options.sweep or (options.shapes and "S" not in names) else print_sampling(roofline)
    figures["drawing"] = [asdict(figure) for figure in drawing]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    if not options.sweep:
        print("\n".join(held_against(figures["shapes"])))
    wrong = any(figure["error"] > MOST_ERROR for figure in figures["shapes"]) or any(f.differing for f in drawing)
    return 1 if wrong else 0


def held_against(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many times as fast shapes are as the one they are to be faster than, where both were timed."""
    times = {figure["name"]: figure["us"] for figure in figures}
    return [
        f"{shape.name}: {times[shape.base] / times[shape.name]:.2f} x as fast as {shape.base}, goal {shape.faster} x"
        for shape in SHAPES
        if shape.name in times and shape.base in times
    ]


def _tuned(shape: Shape) -> Tuning:
    properties = torch.cuda.get_device_properties()
    scaled = bool(shape.kept) and kernels.FORMATS[shape.kept].largest > 0
    return tuning(128, 2, Processor(multiprocessors=properties.multi_processor_count), scaled=scaled)


def _timed(setting: Setting, roofline: Roofline, *, alone: bool) -> list[dict[str, Any]]:
    """One line of the table."""
    shape, tuned = setting.shape, _tuned(setting.shape)
    plan = setting.plan(tuned)
    error = setting.error(setting.run(plan, setting.num_layers - 1), setting.num_layers - 1)
    floor = roofline.floor(shape.bytes, shape.operations)
    ours = graph_microseconds(partial(setting.run, plan), setting.num_layers)
    plain = None
    if shape.shared:
        separate = setting.plan(replace(tuned, share=False))
        plain = graph_microseconds(partial(setting.run, separate), setting.num_layers)
    planned = host_microseconds(lambda: setting.plan(tuned))
    figure = {"name": shape.name, "us": ours, "floor": floor, "goal": shape.target, "plain": plain, "plan_us": planned}
    figure |= {"error": error, "sdpa": None if alone else sdpa_microseconds(setting), "layers": setting.num_layers}
    cells = "".join(f"{'-':>9}" if figure[k] is None else f"{figure[k]:9.1f}" for k in ("plain", "sdpa", "plan_us"))
    print(f"{shape.name:6}{ours:9.1f}{ours / floor:9.2f}{shape.target:6.2f}{cells}{error:9.1e}", flush=True)
    return [figure]


def _swept(setting: Setting, roofline: Roofline) -> list[dict[str, Any]]:
    """The best configurations of one shape."""
    shape = setting.shape
    found: list[dict[str, Any]] = []
    floor = roofline.floor(shape.bytes, shape.operations)
    wide = max(shape.query_lens) > 1 or shape.shared > 0
    for tuned in _candidates(_tuned(shape), decodes=min(shape.query_lens) == 1, wide=wide):
        try:
            plan = setting.plan(tuned)
            error = setting.error(setting.run(plan, 0), 0)
            ours = graph_microseconds(partial(setting.run, plan), setting.num_layers)
        except Exception as failure:  # noqa: BLE001 - too many registers or too much shared memory: no candidate
            print(f"{shape.name} {tuned.decode} {tuned.wide}: {type(failure).__name__}")
            torch.cuda.synchronize()
            continue
        found.append({"name": shape.name, "us": ours, "floor": floor, "error": error, "config": _text(tuned)})
    found.sort(key=lambda figure: figure["us"])
    for figure in found[:4] + found[-1:]:
        print(f"{shape.name:4}{figure['us']:9.1f}{figure['us'] / floor:7.2f} {figure['error']:.0e} {figure['config']}")
    return found


def _text(tuned: Tuning) -> str:
    decode, wide = tuned.decode, tuned.many
    return (
        f"decode {decode.tile}x{decode.num_warps}w{decode.num_stages}s {decode.shortest} room "
        f"{decode.resident}, wide {wide.rows}x{wide.tile}x{wide.num_warps}w{wide.num_stages}s {wide.shortest}"
    )


def _candidates(tuned: Tuning, *, decodes: bool, wide: bool) -> Iterator[Tuning]:
    """The current one, then changes of it."""
    yield tuned
    if decodes:
        loops = ((64, 4, 2, 5), (64, 4, 4, 2), (32, 4, 4, 4), (128, 4, 2, 2), (64, 2, 2, 5))
        for tile, warps, stages, resident in loops:
            change = replace(tuned.decode, tile=tile, num_warps=warps, num_stages=stages, resident=resident)
            yield replace(tuned, decode=change)
    if wide:
        for rows, tile, warps, stages in (
            (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (64, 32, 4, 4), (128, 64, 8, 2), (128, 64, 8, 4),
            (128, 128, 8, 2), (128, 32, 8, 4), (128, 64, 4, 3),
        ):  # fmt: skip
            wider = replace(tuned.wide, rows=rows, tile=tile, num_warps=warps, num_stages=stages)
            yield replace(tuned, wide=wider, many=wider)


if __name__ == "__main__":
    sys.exit(main())
