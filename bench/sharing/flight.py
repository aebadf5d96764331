"""Identical cold prompts at once: with single flight one of them is computed, without reuse all are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from bench.sharing.finding import Claim, Finding, Row
from bench.sharing.local_worker import LocalWorker, WorkerShape, random_tokens
from worker.batch import SamplingParams


@dataclass(frozen=True, slots=True)
class FlightShape:
    """How many identical prompts, how long, and what is generated for each."""

    requests: int = 64
    prompt: int = 2048
    answer: int = 8
    seed: int = 2


def run(shape: FlightShape, worker: WorkerShape, say: Callable[[str], None]) -> Finding:
    """With reuse and without."""
    tokens = random_tokens(random.Random(shape.seed), shape.prompt)
    blocks = shape.requests * (-(-(shape.prompt + shape.answer) // worker.block_size) + 1)
    rows: list[Row] = []
    computed: dict[bool, int] = {}
    answers: dict[bool, list[list[int]]] = {}
    for reuse in (True, False):
        say(f"{shape.requests} identical prompts, reuse {reuse}")
        one = LocalWorker(replace(worker, num_blocks=blocks, reuse=reuse))
        began = one.now
        for _ in range(shape.requests):
            one.submit(tokens, one.regions("a"), sampling=SamplingParams(max_tokens=shape.answer))
        one.run()
        computed[reuse] = one.computed
        answers[reuse] = [answer.token_ids for answer in one.answers.values()]
        rows.append(
            {
                "run": "reuse" if reuse else "no reuse",
                "prompt tokens computed": one.computed,
                "prompts' worth": round(one.computed / shape.prompt, 3),
                "most blocks held": one.peak_blocks,
                "TTFT p50 s": round(median(answer.ttft_s for answer in one.answers.values()), 3),
                "seconds": round(one.now - began, 3),
            }
        )
        one.close()
    differ = sum(a != b for a, b in zip(answers[True], answers[False], strict=True))
    return Finding(
        "flight",
        f"{shape.requests} identical cold prompts of {shape.prompt} tokens at once, {shape.answer} tokens each",
        tuple(rows),
        (
            Claim("prompt tokens computed", computed[True], "<=", 1.05 * shape.prompt + shape.requests),
            Claim("answers that differ from those without reuse", differ, "=", 0),
        ),
    )
