"""Several answers to one prompt that ends inside a block: one prefill, one copy of what they share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.sharing.finding import Claim, Finding, Row
from bench.sharing.local_worker import LocalWorker, WorkerShape, random_tokens
from worker.batch import SamplingParams


@dataclass(frozen=True, slots=True)
class ForksShape:
    """`answers` of `answer` tokens each, to a prompt of `prompt` tokens."""

    answers: int = 8
    prompt: int = 1000
    answer: int = 40
    seed: int = 3


def run(shape: ForksShape, worker: WorkerShape, say: Callable[[str], None]) -> Finding:
    """As forks of one request, and as requests of their own without reuse."""
    size = worker.block_size
    if shape.prompt % size == 0:
        raise ValueError("the prompt must end inside a block")
    tokens = random_tokens(random.Random(shape.seed), shape.prompt)
    # The last token of an answer is never computed.
    blocks = -(-(shape.prompt + shape.answer - 1) // size)
    shared = shape.prompt // size
    private = shape.answers * (blocks - shared)
    draws = [SamplingParams(max_tokens=shape.answer, temperature=1.0, seed=11 + i) for i in range(shape.answers)]
    room = replace(worker, num_blocks=2 * shape.answers * blocks)

    say(f"{shape.answers} forks of one prompt")
    forked = LocalWorker(room)
    seeds = tuple(draw.seed for draw in draws[1:])
    forked.submit(tokens, forked.regions("a"), sampling=draws[0], fork_seeds=seeds)
    forked.run()
    say(f"{shape.answers} requests without reuse")
    apart = LocalWorker(replace(room, reuse=False))
    for draw in draws:
        apart.submit(tokens, apart.regions("a"), sampling=draw)
    apart.run()
    differ = sum(forked.answers[i].token_ids != apart.answers[i].token_ids for i in forked.answers)
    rows: tuple[Row, ...] = tuple(
        {
            "run": name,
            "prompt tokens computed": one.computed,
            "most blocks held": one.peak_blocks,
            "blocks copied": one.copies,
        }
        for name, one in (("forks", forked), ("requests without reuse", apart))
    )
    forked.close()
    apart.close()
    return Finding(
        "forks",
        f"n = {shape.answers} over a prompt of {shape.prompt} tokens ({shared} full blocks of {size} and "
        f"{shape.prompt % size} tokens), {shape.answer} tokens each; "
        f"{shared} shared + {shape.answers} x {blocks - shared} private blocks",
        rows,
        (
            Claim("prompt tokens computed", forked.computed, "=", shape.prompt),
            Claim("blocks held at the end, shared + private", forked.peak_blocks, "=", shared + private),
            Claim("answers that differ from those of requests without reuse", differ, "=", 0),
        ),
    )
