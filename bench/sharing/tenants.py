"""Many tenants behind one published system prompt: what each computes of it, and what none sees of another's tail.

Three runs of one workload: published head and private tails, everything in one scope, and nothing shared at all. Then
tenants try prompts of others, word for word, on the first run's store. All of it once with a head of whole blocks and
once with one that ends inside a block.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.sharing.finding import Claim, Finding, Row, share
from bench.sharing.local_worker import LocalWorker, WorkerShape, random_tokens
from kvstore.block_table import BlockTable
from kvstore.scope import Region
from worker.batch import SamplingParams

Say = Callable[[str], None]
Scopes = Callable[[LocalWorker, int], tuple[Region, ...]]
PROBES_TOLD = 20_000


@dataclass(frozen=True, slots=True)
class TenantsShape:
    """Each tenant sends `turns` prompts: the head, `opening` tokens that all tails begin with, then its own."""

    tenants: int = 256
    head: int = 2000
    opening: int = 8
    tail: int = 120
    turns: int = 2
    answer: int = 4
    probes: int = 100_000
    seed: int = 1


SHAPES = (TenantsShape(), TenantsShape(head=2003))


def run_all(shapes: Sequence[TenantsShape], worker: WorkerShape, say: Say) -> Finding:
    """`run` for each of these shapes, which differ by their heads."""
    found = [run(shape, worker, say) for shape in shapes]
    rows = [{"head": shape.head, **row} for shape, one in zip(shapes, found, strict=True) for row in one.rows]
    claims = [
        replace(claim, says=f"head of {shape.head}: {claim.says}")
        for shape, one in zip(shapes, found, strict=True)
        for claim in one.claims
    ]
    return Finding("tenants", "; ".join(one.setting for one in found), tuple(rows), tuple(claims))


def run(shape: TenantsShape, worker: WorkerShape, say: Say) -> Finding:
    """All three runs, and the probes."""
    prompts = make_prompts(shape)
    longest = shape.head + shape.opening + shape.turns * shape.tail + shape.answer
    big = replace(worker, num_blocks=shape.tenants * (longest // worker.block_size + 4))
    kinds: dict[str, Scopes] = {
        "published head": lambda one, tenant: one.regions(str(tenant), public=shape.head),
        "one scope": lambda one, tenant: one.regions("all"),
        "no sharing": lambda one, tenant: one.regions(str(tenant)),
    }
    rows: list[Row] = []
    hits: dict[str, float] = {}
    heads: dict[str, int] = {}
    leaks, own = 0, 0.0
    for name, scopes in kinds.items():
        say(f"{name}: {shape.tenants} tenants, {shape.turns} turns")
        one = LocalWorker(big)
        began = one.now
        for turn in range(shape.turns):
            for tenant in range(shape.tenants):
                sampling = SamplingParams(max_tokens=shape.answer)
                one.submit(prompts[tenant][turn], scopes(one, tenant), sampling=sampling)
            one.run()
        hits[name] = one.hit_percent
        heads[name] = sum(max(0, shape.head - answer.cached) for answer in one.answers.values())
        rows.append(
            {
                "run": name,
                "head tokens computed": heads[name],
                "prompt tokens computed": one.computed,
                "hit %": round(hits[name], 2),
                "seconds": round(one.now - began, 2),
            }
        )
        if name == "published head":
            leaks, own = probe(shape, one, prompts, say)
        one.close()
    ratio = share(hits["published head"], hits["one scope"])
    return Finding(
        "tenants",
        f"{shape.tenants} tenants, one published head of {shape.head} tokens, tails of {shape.opening} common and "
        f"{shape.tail} own tokens, {shape.turns} prompts each, all at once a turn; {shape.probes} probes",
        tuple(rows),
        (
            Claim("tokens of the head computed, all tenants together", heads["published head"], "=", shape.head),
            Claim("hit ratio, % of the run in one scope", ratio, ">=", 95.0),
            Claim(f"of {shape.probes} probes, hits past the border", leaks, "=", 0),
            Claim("prompts sent by their owners (1000 or as many as probes), % found past the head", own, "=", 100.0),
        ),
    )


def probe(shape: TenantsShape, worker: LocalWorker, prompts: list[list[array[int]]], say: Say) -> tuple[int, float]:
    """Prompts of one tenant sent by another, or by one that never sent anything: how many find more than the head, or
    than the sender has in common with it by prompts of its own. And the percentage of 1,000 probes by their owners that
    find more than the head: probes that could find nothing would prove nothing."""
    rng = random.Random(shape.seed + 1)
    senders = [*range(shape.tenants), *(f"newcomer-{number}" for number in range(shape.tenants))]
    tables = [BlockTable(worker.pool, worker.regions(str(name), public=shape.head)) for name in senders]
    leaks = 0
    for number in range(shape.probes):
        victim = rng.randrange(shape.tenants)
        sender = (victim + rng.randrange(1, len(senders))) % len(senders)
        tokens = rng.choice(prompts[victim])
        allowed = shape.head
        if sender < shape.tenants:
            allowed += _common(tokens, prompts[sender][-1], shape.head)
        leaks += _found(tables[sender], tokens) > allowed
        if (number + 1) % PROBES_TOLD == 0:
            say(f"{number + 1} probes, {leaks} hits past the border")
    times = min(1000, shape.probes)
    owners = [rng.randrange(shape.tenants) for _ in range(times)]
    own = sum(_found(tables[owner], rng.choice(prompts[owner])) > shape.head + shape.opening for owner in owners)
    return leaks, 100.0 * own / times


def _found(table: BlockTable, tokens: array[int]) -> int:
    """Tokens that an admission would find cached."""
    found = table.attach_prefix(tokens, len(tokens) - 1)
    table.release()
    return found


def _common(one: array[int], other: array[int], start: int) -> int:
    """How many tokens from `start` on are the same in both."""
    end = start
    while end < min(len(one), len(other)) and one[end] == other[end]:
        end += 1
    return end - start


def make_prompts(shape: TenantsShape) -> list[list[array[int]]]:
    """By tenant and turn; a turn goes on from the one before it."""
    rng = random.Random(shape.seed)
    before = random_tokens(rng, shape.head) + random_tokens(rng, shape.opening)
    prompts = []
    for _ in range(shape.tenants):
        turns = [before]
        for _ in range(shape.turns):
            turns.append(turns[-1] + random_tokens(rng, shape.tail))
        prompts.append(turns[1:])
    return prompts
