"""Conversations that together are larger than the device pool: what is computed again with a CPU tier and without."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from bench.sharing.finding import Claim, Finding, Row
from bench.sharing.local_worker import LocalWorker, WorkerShape, random_tokens
from worker.batch import SamplingParams


@dataclass(frozen=True, slots=True)
class MultiTurnShape:
    """`conversations` go on in another order each turn, `at_once` of them side by side. At the end they are `times` the
    device pool; in one order for all turns nothing would be left when it is wanted again."""

    conversations: int = 24
    turns: int = 6
    first: int = 256
    question: int = 64
    answer: int = 32
    at_once: int = 4
    times: float = 3.0
    cpu_times: float = 4.0
    seed: int = 6

    @property
    def longest(self) -> int:
        """Tokens of a conversation after its last turn."""
        return self.first + self.turns * (self.question + self.answer)


def run(shape: MultiTurnShape, worker: WorkerShape, say: Callable[[str], None]) -> Finding:
    """With the tier and without, and with a device that holds everything."""
    whole = shape.conversations * (-(-shape.longest // worker.block_size))
    small = replace(worker, num_blocks=int(whole / shape.times))
    kinds = {
        "no CPU tier": small,
        "CPU tier": replace(small, cpu_blocks=int(shape.cpu_times * small.num_blocks)),
        "large device": replace(worker, num_blocks=2 * whole),
    }
    rows: list[Row] = []
    computed: dict[str, int] = {}
    answers: dict[str, list[list[int]]] = {}
    for name, one_shape in kinds.items():
        say(f"{shape.conversations} conversations, {name}")
        one = LocalWorker(one_shape)
        one.warm_up()
        began = one.now
        answers[name] = _talk(shape, one)
        computed[name] = one.computed
        all_answers = list(one.answers.values())
        rows.append(
            {
                "run": name,
                "prompt tokens computed": one.computed,
                "of": sum(answer.num_prompt_tokens for answer in all_answers),
                "hit %": round(one.hit_percent, 2),
                "loaded tokens": sum(a.facts.cached_cpu_tokens for a in all_answers if a.facts is not None),
                "TTFT p50 s": round(median(answer.ttft_s for answer in all_answers), 4),
                "seconds": round(one.now - began, 2),
            }
        )
        one.close()
    differ = sum(a != b for a, b in zip(answers["CPU tier"], answers["large device"], strict=True))
    ratio = round(computed["no CPU tier"] / computed["CPU tier"], 3)
    return Finding(
        "multi_turn",
        f"{shape.conversations} conversations of {shape.turns} turns, {shape.question} tokens asked and {shape.answer} "
        f"answered a turn after {shape.first}, {shape.at_once} at once in random order; {whole} blocks in all, "
        f"{small.num_blocks} on the device, {kinds['CPU tier'].cpu_blocks} in CPU memory",
        tuple(rows),
        (
            Claim("prompt tokens computed without the tier / with it", ratio, ">=", 2.0),
            *((Claim("answers that differ from those of a large device", differ, "=", 0),) if worker.simulated else ()),
        ),
    )


def _talk(shape: MultiTurnShape, one: LocalWorker) -> list[list[int]]:
    """All turns of all conversations; the answers in order."""
    rng = random.Random(shape.seed)
    texts = [random_tokens(rng, shape.first) for _ in range(shape.conversations)]
    answers = []
    for _ in range(shape.turns):
        order = rng.sample(range(shape.conversations), shape.conversations)
        for at in range(0, shape.conversations, shape.at_once):
            now = order[at : at + shape.at_once]
            numbers = {}
            for index in now:
                texts[index] = texts[index] + random_tokens(rng, shape.question)
                sampling = SamplingParams(max_tokens=shape.answer)
                numbers[index] = one.submit(texts[index], one.regions(f"t{index}"), sampling=sampling)
            one.run()
            for index, number in numbers.items():
                answer = one.answers[number].token_ids
                texts[index].extend(answer)
                answers.append(answer)
    return answers
