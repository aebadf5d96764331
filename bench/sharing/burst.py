"""One tenant's burst of unique prompts beside another's working set: what quotas keep for the other.

Tenant B sends the same prompts round after round, all of them together within its floor. Beside those of its later
rounds tenant A sends ten times its ceiling in prompts that never come back. B alone is the yardstick.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from bench.sharing.finding import Claim, Finding, Row
from bench.sharing.local_worker import Answer, LocalWorker, WorkerShape, hit_percent, random_tokens
from kvstore.quota import Quota
from worker.batch import SamplingParams
from worker.holdings import OwnerQuota


@dataclass(frozen=True, slots=True)
class BurstShape:
    """Sizes in blocks, prompts of `prompt_blocks` each. `excess`: the burst as a multiple of A's ceiling. The first
    `quiet` of the rounds are B's alone; what comes after is measured."""

    pool: int = 1024
    floor: int = 512
    ceiling: int = 256
    excess: int = 10
    prompt_blocks: int = 32
    own_prompts: int = 14
    quiet: int = 2
    rounds: int = 5
    at_once: int = 2
    seed: int = 4


def run(shape: BurstShape, worker: WorkerShape, say: Callable[[str], None]) -> Finding:
    """B alone; with the burst and quotas; with the burst and none, under two policies."""
    pool = replace(worker, num_blocks=shape.pool)
    alone, _ = _rounds(shape, pool, burst=False, quotas=True)
    kinds = {
        "burst, quotas": (pool, True),
        "burst, no quotas, slru": (pool, False),
        "burst, no quotas, lru": (replace(pool, policy="lru"), False),
    }
    rows: list[Row] = [{"run": "B alone", "B's hit %": round(alone, 2), "change": 0.0, "A's most cached blocks": 0}]
    changes: dict[str, float] = {}
    most: dict[str, int] = {}
    for name, (one, quotas) in kinds.items():
        say(name)
        hits, most[name] = _rounds(shape, one, burst=True, quotas=quotas)
        changes[name] = round(hits - alone, 2)
        rows.append(
            {
                "run": name,
                "B's hit %": round(hits, 2),
                "change": changes[name],
                "A's most cached blocks": most[name],
            }
        )
    return Finding(
        "burst",
        f"pool of {shape.pool} blocks; B: floor {shape.floor}, {shape.own_prompts} prompts of {shape.prompt_blocks} "
        f"blocks in {shape.rounds} rounds, {shape.quiet} of them before the burst; A: ceiling {shape.ceiling}, "
        f"{shape.excess * shape.ceiling} blocks of unique prompts, {shape.at_once} at once, beside B's",
        tuple(rows),
        (
            Claim("change of B's hit ratio, points", abs(changes["burst, quotas"]), "<=", 2.0),
            Claim("blocks that A keeps when it is idle", most["burst, quotas"], "<=", shape.ceiling),
        ),
    )


def _rounds(shape: BurstShape, worker: WorkerShape, *, burst: bool, quotas: bool) -> tuple[float, int]:
    """B's hit ratio in percent after its quiet rounds, and the most that A had cached with nothing running."""
    rng = random.Random(shape.seed)
    one = LocalWorker(worker)
    length = shape.prompt_blocks * worker.block_size
    own = [random_tokens(rng, length + 5) for _ in range(shape.own_prompts)]
    quota_a = OwnerQuota(Quota(ceiling=shape.ceiling)) if quotas else None
    quota_b = OwnerQuota(Quota(floor=shape.floor)) if quotas else None
    sampling = SamplingParams(max_tokens=4)
    most = 0
    later: list[Answer] = []
    bursts = _bursts(shape, rng, length)
    for round_number in range(shape.rounds):
        for tokens in own:
            number = one.submit(tokens, one.regions("b"), sampling=sampling, quota=quota_b)
            if round_number >= shape.quiet:
                later.append(one.answers[number])
                for unique in next(bursts) if burst else ():
                    one.submit(unique, one.regions("a"), sampling=sampling, quota=quota_a)
            one.run()
            most = max(most, one.pool.account(one.root("tenant:a")).charge)
    one.close()
    return hit_percent(later), most


def _bursts(shape: BurstShape, rng: random.Random, length: int) -> Iterator[list[array[int]]]:
    """A's prompts, `at_once` beside each of B's, until the burst is over."""
    left = shape.excess * shape.ceiling // shape.prompt_blocks
    while True:
        count = min(left, shape.at_once)
        left -= count
        yield [random_tokens(rng, length) for _ in range(count)]
