"""`python -m bench.kernels.counts [--shapes C1,C4] [--cpu] [--json FILE]`: KV bytes that one layer of a step reads.

Needs no GPU: the pieces are those of the real plans, their order in time is simulated. `pieces` adds up the ranges of
keys that all pieces read for each key head: several tiles of query rows read one shared range. `memory` is what of it
a cache of the processor's size misses, least recently used out first, while as many programs as there is room for go
on at the rates in `kernels.configs`, unevenly. `alone` is the same where each sequence reads for itself. `states` are
partial results, written and read back. All are given in unique bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heapify, heappop, heapreplace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from bench.engine.tables import markdown
from bench.kernels.shapes import BLOCK_SIZE, SHAPES, Shape, block_tables
from kernels import cpu
from kernels.configs import Tuning
from kernels.cpu_plan import CpuPlan
from kernels.device_plan import DevicePlan, plan_attention
from kernels.step import Ints
from kernels.work_list import END, NODE, SEQUENCE, START

CLAIMED = ("C1", "C2", "C3", "C4")
MOST = 1.1
"""KV bytes read over unique ones, of what is claimed: on a GPU from memory, on the CPU by all pieces."""
CPU_CACHE = 32 << 20
CPU_CORES = 8
TURN = 64
"""Keys that a program reads before others go on."""

UNEVEN = 0.5
"""A turn takes so much of its time more or less, at random."""

Piece = tuple[int, int, int]
"""Table row, first key, end."""


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes that a plan reads: asked for by all pieces, and of these from memory."""

    pieces: int
    memory: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes of one layer. `nodes`: tiles and cuts of shared prefixes."""

    name: str
    path: str
    unique: int
    planned: Read
    alone: Read
    states: int
    nodes: int

    def claims(self) -> dict[str, bool]:
        """What is claimed of the shape, and whether it is so."""
        if self.name not in CLAIMED:
            return {}
        most = MOST * self.unique
        if self.path == "cpu":
            return {"pieces": self.planned.pieces <= most}
        return {"memory": self.planned.memory <= most}


@dataclass(frozen=True, slots=True)
class Launch:
    """Programs of one kernel in the order they begin, of which so many run at once."""

    programs: Sequence[tuple[int, Piece]]
    """Key head and piece."""
    room: int
    turn_us: float
    """Time of a program for `TURN` keys."""


def gpu_counts(shape: Shape, tuned: Tuning | None = None) -> Counts:
    """Of the Triton kernels' plan for bfloat16, shared where the cost model in `kernels.configs` says, or `tuned`."""
    tables = block_tables(shape)
    plan = _device_plan(shape, tables, tuned)
    separate = _device_plan(shape, tables, replace(plan.tuning, share=False))
    num_heads, num_kv_heads, head_dim = shape.heads
    room = plan.tuning.processor.cache_size
    return Counts(
        name=shape.name,
        path="gpu",
        unique=shape.distinct_keys * num_kv_heads * 2 * head_dim * 2,
        planned=_read(shape, tables, _launches(plan, num_kv_heads), 2, room),
        alone=_read(shape, tables, _launches(separate, num_kv_heads), 2, room),
        states=2 * 4 * plan.parts.shape[0] * num_heads * (head_dim + 1),
        nodes=int(plan.work[None].wide[:, NODE].sum()),
    )


def cpu_counts(shape: Shape) -> Counts:
    """Of the native CPU code in float32: `pieces` counted by the code as it attends, `alone` as if each sequence were
    read on its own, head after head, on `CPU_CORES` with `CPU_CACHE` for all of them."""
    tables = block_tables(shape)
    lens, contexts = np.array(shape.query_lens), np.array(shape.context_lens)
    num_heads, num_kv_heads, head_dim = shape.heads
    cache = torch.zeros(_size(shape, tables))  # nothing is written there, so that it takes no memory
    plan = cpu.plan_attention(cache, lens, contexts, tables, num_heads=num_heads)
    if not isinstance(plan, CpuPlan):
        raise RuntimeError("no native code takes this step")
    counter = np.zeros(1, dtype=np.int64)
    plan = replace(plan, taken=counter)
    cpu.attention(torch.zeros(len(lens), num_heads, head_dim), cache[:, 0], plan, scale=1.0)
    key_bytes = 2 * head_dim * 4
    pieces = [(sequence, 0, position + rows) for sequence, _, rows, position in plan.members.tolist()]
    launch = Launch([(head, piece) for head in range(num_kv_heads) for piece in pieces], CPU_CORES, 1.0)
    alone = _read(shape, tables, [launch], 4, CPU_CACHE)
    taken = int(counter[0]) * key_bytes
    unique = shape.distinct_keys * num_kv_heads * key_bytes
    planned = Read(taken, min(taken, alone.memory))
    return Counts(shape.name, "cpu", unique, planned=planned, alone=alone, states=0, nodes=sum(np.diff(plan.teams) > 1))


def _device_plan(shape: Shape, tables: Ints, tuned: Tuning | None) -> DevicePlan:
    """Planning asks for the cache's shape only."""
    lens, contexts = np.array(shape.query_lens), np.array(shape.context_lens)
    cache = torch.empty(1, dtype=torch.bfloat16).expand(_size(shape, tables))
    return plan_attention(cache, lens, contexts, tables, num_heads=shape.heads[0], tuned=tuned)


def _size(shape: Shape, tables: Ints) -> tuple[int, ...]:
    _, num_kv_heads, head_dim = shape.heads
    return int(tables.max()) + 1, 1, 2, num_kv_heads, BLOCK_SIZE, head_dim


def _launches(plan: DevicePlan, num_kv_heads: int) -> list[Launch]:
    """As `kernels.device` launches them: both at the same time, heads of an item one after the other."""
    work, tuned = plan.work[None], plan.tuning
    wide = [(item[SEQUENCE], item[START], item[END]) for item in work.wide.tolist()]
    decode = [(row, start, end) for _, row, start, end, *_ in work.decode.tolist()]
    processor = tuned.processor
    kinds = ((wide, 2, processor.paired_keys), (decode, tuned.decode.resident, processor.decode_keys))
    return [
        Launch(
            [(head, piece) for piece in pieces for head in range(num_kv_heads)],
            room=resident * processor.multiprocessors,
            turn_us=TURN * resident / keys,
        )
        for pieces, resident, keys in kinds
    ]


def _read(shape: Shape, tables: Ints, launches: Sequence[Launch], itemsize: int, cache_bytes: int) -> Read:
    _, num_kv_heads, head_dim = shape.heads
    key_bytes = 2 * head_dim * itemsize
    of_block = key_bytes * BLOCK_SIZE
    keys = sum(end - start for launch in launches for _, (_, start, end) in launch.programs)
    misses = missed(reads(launches, tables, num_kv_heads), cache_bytes // of_block)
    return Read(keys * key_bytes, misses * of_block)


def reads(launches: Sequence[Launch], tables: Ints, num_kv_heads: int) -> Iterator[int]:
    """Numbers of a block's rows of one head, in the order in which programs come to them, `TURN` keys at a time; where
    one ends the next of its launch begins."""
    rng = random.Random(0)
    waiting = [iter(launch.programs) for launch in launches]
    running: list[tuple[float, int, int, Piece]] = []
    for at, launch in enumerate(launches):
        running += [(rng.random() * launch.turn_us, at, *program) for program in islice(waiting[at], launch.room)]
    heapify(running)
    while running:
        now, at, head, (row, start, end) = running[0]
        stop = min(start + TURN, end)
        blocks = tables[row, start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)]
        yield from (blocks * num_kv_heads + head).tolist()
        after = (head, (row, stop, end)) if stop < end else next(waiting[at], None)
        if after is None:
            heappop(running)
        else:
            then = now + launches[at].turn_us * rng.uniform(1 - UNEVEN, 1 + UNEVEN)
            heapreplace(running, (then, at, *after))


def missed(numbers: Iterator[int], room: int) -> int:
    """How many of these reads a cache with so much room does not have: the least recently used goes first."""
    held: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for number in numbers:
        if number in held:
            held.move_to_end(number)
            continue
        misses += 1
        held[number] = None
        if len(held) > room:
            held.popitem(last=False)
    return misses


def table(found: Sequence[Counts]) -> str:
    """In markdown, one line each."""
    head = ["shape", "path", "unique MB", "pieces", "memory", "pieces alone", "memory alone", "states"]
    body = []
    for one in found:
        values = (one.planned.pieces, one.planned.memory, one.alone.pieces, one.alone.memory, one.states)
        cells = [f"{value / one.unique:.2f}" for value in values]
        claims = [f"{name} {'met' if held else 'MISSED'}" for name, held in one.claims().items()]
        if one.path == "gpu" and not one.nodes:
            claims.append("nothing shared: it saves less than its launches take")
        body.append([one.name, one.path, f"{one.unique / 1e6:.1f}", *cells, ", ".join(claims) or "-"])
    return markdown([*head, f"claim: at most {MOST}"], body)


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a claim is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.counts", description=__doc__)
    parser.add_argument("--shapes", default="C1,C2,C3,C4,C6", help="separated by commas")
    parser.add_argument("--cpu", action="store_true", help="the native CPU code's plan too")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args(arguments)
    shapes = [shape for shape in SHAPES if shape.name in options.shapes.split(",")]
    found = [gpu_counts(shape) for shape in shapes]
    if options.cpu:
        found += [cpu_counts(shape) for shape in shapes]
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", "utf-8")
    return 0 if all(held for one in found for held in one.claims().values()) else 1


if __name__ == "__main__":
    sys.exit(main())
