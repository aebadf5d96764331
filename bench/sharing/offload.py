"""Requests over one long shared prefix on a device too small for all of them, with a CPU tier and without.

All send a first prompt at once, pause, and go on with their answers and another question, again at once. Meanwhile
another tenant had a prompt that takes most of the device. Both kinds run in turn, several times, on the same texts;
ratios are of pairs that ran one after the other. Time in which nobody waits for anything is not counted. In the first,
cold turn there is nothing to load: what its pairs differ by is noise and the cost of copies, the control of the gain.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from time import process_time

from bench.sharing.finding import Claim, Finding, Row
from bench.sharing.local_worker import Answer, LocalWorker, WorkerShape, random_tokens
from worker.batch import SamplingParams


@dataclass(frozen=True, slots=True)
class OffloadShape:
    """`requests` at once, each the prefix and a tail of its own; then questions. `device` and `cpu` in blocks."""

    requests: int = 50
    prefix: int = 1024
    tail: int = 128
    question: int = 32
    answer: int = 8
    turns: int = 2
    other: int = 2400
    pause_s: float = 0.25
    device: int = 160
    cpu: int = 1024
    repetitions: int = 7
    seed: int = 5


@dataclass(frozen=True, slots=True)
class Run:
    """One repetition of one kind."""

    seconds: float
    cpu_s: float
    tokens: int
    ttft_s: float
    first_s: float
    last_s: float
    first_cpu_s: float
    first_ttft_s: float
    last_ttft_s: float
    computed: int
    loaded: int
    preempted: int
    demoted: int
    evicted: int


def run(shape: OffloadShape, worker: WorkerShape, say: Callable[[str], None]) -> Finding:
    """Interleaved repetitions, the kind that goes first in turn."""
    without = replace(worker, num_blocks=shape.device)
    kinds = {"no CPU tier": without, "CPU tier": replace(without, cpu_blocks=shape.cpu)}
    runs: dict[str, list[Run]] = {name: [] for name in kinds}
    for repetition in range(shape.repetitions):
        for name in sorted(kinds, reverse=repetition % 2 == 1):
            one = _once(shape, kinds[name], repetition)
            runs[name].append(one)
            say(
                f"{repetition + 1}/{shape.repetitions} {name}: {one.first_s:.2f} s and {one.last_s:.2f} s, "
                f"TTFT p50 {one.first_ttft_s:.3f} s and {one.last_ttft_s:.3f} s"
            )
    computed = sum(a.computed for a in runs["CPU tier"]) / sum(b.computed for b in runs["no CPU tier"])
    pairs = list(zip(runs["CPU tier"], runs["no CPU tier"], strict=True))
    ratios: dict[str, list[float]] = {
        name: [getattr(a, name) / getattr(b, name) for a, b in pairs]
        for name in ("ttft_s", "first_s", "last_s", "first_ttft_s", "last_ttft_s")
    }
    throughput = median(b.seconds / a.seconds * a.tokens / b.tokens for a, b in pairs)
    return Finding(
        "offload",
        f"{shape.requests} requests at once over one prefix of {shape.prefix} tokens, tails of {shape.tail}, "
        f"{shape.answer} tokens answered, {shape.turns} turns with {shape.question} tokens asked, between them "
        f"a prompt of {shape.other} tokens by another tenant; {shape.device} blocks on the device, {shape.cpu} in CPU "
        f"memory; medians of {shape.repetitions} interleaved repetitions, {worker.threads} thread for the model",
        tuple(_row(name, found) for name, found in runs.items()),
        (
            Claim("prompt tokens computed with the tier / without", round(computed, 3), "<=", 1.0),
            Claim("throughput with the tier / without", round(throughput, 3), ">=", 1.0),
            Claim("TTFT p50 with the tier / without", _median(ratios["ttft_s"]), "<", 1.0),
            Claim("the same of the first, cold turn alone: never slower", _median(ratios["first_ttft_s"]), "<=", 1.05),
            *(() if worker.simulated else (_cold_cpu(pairs),)),
            Claim("TTFT p50 of the last turn with the tier / without", _median(ratios["last_ttft_s"]), "<", 1.0),
            Claim("its middle pair / the best pair of the cold turn", _beyond(ratios, "ttft_s"), "<", 1.0),
            Claim("seconds of the last turn with the tier / without", _median(ratios["last_s"]), "<", 1.0),
            Claim("the middle pair of these / the best of the cold turn", _beyond(ratios, "s"), "<", 1.0),
        ),
    )


def _median(ratios: list[float]) -> float:
    return round(median(ratios), 3)


def _cold_cpu(pairs: list[tuple[Run, Run]]) -> Claim:
    """What the tier costs where it cannot gain, whatever else the machine does."""
    found = median(a.first_cpu_s / b.first_cpu_s for a, b in pairs)
    return Claim("CPU seconds of the cold turn, copies among them", round(found, 3), "<=", 1.05)


def _beyond(ratios: dict[str, list[float]], what: str) -> float:
    """Below 1, the last turn gained more than any pair of the cold turn did by chance."""
    return round(median(ratios[f"last_{what}"]) / min(ratios[f"first_{what}"]), 3)


def _row(name: str, runs: list[Run]) -> Row:
    def middle(value: Callable[[Run], float]) -> float:
        return round(median(value(one) for one in runs), 3)

    return {
        "run": name,
        "seconds": middle(lambda one: one.seconds),
        "CPU s": middle(lambda one: one.cpu_s),
        "tokens/s": middle(lambda one: one.tokens / one.seconds),
        "TTFT p50 s": middle(lambda one: one.ttft_s),
        "first turn": middle(lambda one: one.first_ttft_s),
        "last turn": middle(lambda one: one.last_ttft_s),
        "first turn s": middle(lambda one: one.first_s),
        "last turn s": middle(lambda one: one.last_s),
        "prompt tokens computed": middle(lambda one: one.computed),
        "demoted blocks": middle(lambda one: one.demoted),
        "evicted blocks": middle(lambda one: one.evicted),
        "loaded tokens": middle(lambda one: one.loaded),
        "preemptions": middle(lambda one: one.preempted),
    }


def _once(shape: OffloadShape, kind: WorkerShape, repetition: int) -> Run:
    rng = random.Random(shape.seed + repetition)
    one = LocalWorker(kind)
    one.warm_up()
    prefix = random_tokens(rng, shape.prefix)
    texts = [prefix + random_tokens(rng, shape.tail) for _ in range(shape.requests)]
    sampling = SamplingParams(max_tokens=shape.answer)
    by_turn: list[list[Answer]] = []
    seconds: list[float] = []
    cpu_s: list[float] = []
    for turn in range(shape.turns):
        if turn:
            one.pause(shape.pause_s)
            texts = [
                text + array("I", answer.token_ids) + random_tokens(rng, shape.question)
                for text, answer in zip(texts, by_turn[-1], strict=True)
            ]
        began, cpu_began = one.now, process_time()
        if turn:
            one.submit(random_tokens(rng, shape.other), one.regions("b"), sampling=SamplingParams(max_tokens=1))
            one.run()
        numbers = [one.submit(text, one.regions("a"), sampling=sampling) for text in texts]
        one.run()
        seconds.append(one.now - began)
        cpu_s.append(process_time() - cpu_began)
        by_turn.append([one.answers[number] for number in numbers])
    everyone = [answer for answers in by_turn for answer in answers]
    ttfts = [median(answer.ttft_s for answer in answers) for answers in by_turn]
    one.close()
    return Run(
        seconds=sum(seconds),
        cpu_s=sum(cpu_s),
        tokens=sum(len(answer.token_ids) for answer in everyone),
        ttft_s=median(answer.ttft_s for answer in everyone),
        first_s=seconds[0],
        last_s=seconds[-1],
        first_cpu_s=cpu_s[0],
        first_ttft_s=ttfts[0],
        last_ttft_s=ttfts[-1],
        computed=one.computed,
        loaded=sum(a.facts.cached_cpu_tokens for a in everyone if a.facts is not None),
        preempted=one.scheduler.num_preemptions,
        demoted=one.offload.counts.demoted if one.offload is not None else 0,
        evicted=one.pool.evictions,
    )
