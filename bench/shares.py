"""What two backlogged tenants get of a fleet, by their weights, whichever routers each comes through.

Real processes: `python -m bench.shares --routers 2`. Service is what workers count: a computed prompt token once, a
generated one twice. Exit code 1 if a claim is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench.process_fleet import key_of, process_fleet
from bench.sharing.__main__ import show
from bench.sharing.finding import Claim, Finding, Row
from pando.client import AsyncClient
from pando.errors import ConfigError, ResourceExhausted
from pando.settings import RouterSettings, WorkerSettings
from worker.fairness import GENERATED_TOKEN, PROMPT_TOKEN

MODEL = "pando-tiny"
VOCAB = range(16, 2048)
WITHIN = 0.05
ONE, ALL = "one", "all"
HEAVY, LIGHT = "heavy", "light"


@dataclass(frozen=True, slots=True)
class SharesShape:
    """`callers` of each tenant ask again as soon as they are answered, refused ones when they are told to.

    `waiting` is the room in each worker's queue. The first `settle_s` seconds are not counted.
    """

    weights: Mapping[str, int] = field(default_factory=lambda: {HEAVY: 4, LIGHT: 1})
    callers: Mapping[str, int] = field(default_factory=lambda: {HEAVY: 48, LIGHT: 48})
    ingress: Mapping[str, str] = field(default_factory=lambda: {HEAVY: ONE, LIGHT: ALL})
    routers: int = 2
    workers: int = 2
    waiting: int = 4096
    sequences: int = 4
    step_ms: float = 40.0
    prompt: int = 64
    answer: int = 16
    settle_s: float = 8.0
    seconds: float = 45.0


REVERSE = {HEAVY: ALL, LIGHT: ONE}
FLOOD = {"waiting": 16, "callers": {HEAVY: 160, LIGHT: 24}}
"""The heavy tenant alone has three times as many callers as there are places."""
CASES = {
    "heavy through one router": SharesShape(),
    "light through one router": SharesShape(ingress=REVERSE),
    "full queues, heavy through one router": SharesShape(**FLOOD),  # type: ignore[arg-type]
    "full queues, light through one router": SharesShape(ingress=REVERSE, **FLOOD),  # type: ignore[arg-type]
}


@dataclass(slots=True)
class Served:
    """What a tenant got within the window."""

    service: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)  # by worker
    refused: int = 0
    unhinted: int = 0  # refusals that did not say when to come again


class Callers:
    """The callers of one tenant, on as many connections as it has routers."""

    def __init__(self, shape: SharesShape, tenant: str, targets: Sequence[str], window: tuple[float, float]) -> None:
        self.served = Served()
        self._shape = shape
        self._tenant = tenant
        self._window = window
        self._rng = random.Random(tenant)
        own = targets[:1] if shape.ingress[tenant] == ONE else targets
        self._clients = [AsyncClient(target, api_key=key_of(tenant)) for target in own]

    async def run(self) -> None:
        """Ask until the window ends; what runs then is cancelled."""
        number = self._shape.callers[self._tenant]
        callers = [self._call(self._clients[caller % len(self._clients)]) for caller in range(number)]
        try:
            async with asyncio.timeout(self._window[1] - time.monotonic()):
                await asyncio.gather(*callers)
        except TimeoutError:
            return
        finally:
            for client in self._clients:
                await client.close()

    async def _call(self, client: AsyncClient) -> None:
        while True:
            try:
                await self._ask(client)
            except ResourceExhausted as refusal:
                self.served.refused += 1
                self.served.unhinted += not refusal.retry_after_s
                await asyncio.sleep((refusal.retry_after_s or 1.0) * self._rng.uniform(0.75, 1.25))

    async def _ask(self, client: AsyncClient) -> None:
        shape = self._shape
        prompt = [self._rng.choice(VOCAB) for _ in range(shape.prompt)]
        is_first = True
        async for chunk in client.stream(token_ids=prompt, max_tokens=shape.answer, ignore_eos=True):
            if time.monotonic() >= self._window[0]:
                self.served.service += GENERATED_TOKEN * len(chunk.token_ids)
                self.served.service += PROMPT_TOKEN * shape.prompt * is_first
                if chunk.usage is not None:
                    self.served.answers[chunk.usage.worker] += 1
            is_first = False


def measure(shape: SharesShape) -> dict[str, Served]:
    """Start a fleet, let both ask, end it; call from the main thread."""
    worker = WorkerSettings(
        model=MODEL,
        runner="simulated",
        max_waiting=shape.waiting,
        max_sequences=shape.sequences,
        simulated_step_ms=shape.step_ms,
    )
    router = RouterSettings(model=MODEL)
    with process_fleet(worker, shape.workers, router, shape.routers, shape.weights) as fleet:
        return asyncio.run(_ask_all(shape, fleet.targets))


def compare(cases: Mapping[str, SharesShape]) -> Finding:
    """Every case, and whether the shares are those of the weights."""
    rows: list[Row] = []
    claims = []
    for name, shape in cases.items():
        served = measure(shape)
        ratio = served[HEAVY].service / max(served[LIGHT].service, 1.0)
        wanted = shape.weights[HEAVY] / shape.weights[LIGHT]
        row: dict[str, float | int | str] = {"case": name, "routers": shape.routers, "service ratio": round(ratio, 3)}
        for tenant in (HEAVY, LIGHT):
            counts = " ".join(str(count) for _, count in sorted(served[tenant].answers.items()))
            row |= {f"{tenant} answers by worker": counts, f"{tenant} refused": served[tenant].refused}
        rows.append(row)
        off = abs(ratio / wanted - 1)
        claims += [
            Claim(f"{name}, {shape.routers} routers: off {wanted:g}:1 by", round(off, 3), "<=", WITHIN),
            Claim("refusals without a time to come again", sum(one.unhinted for one in served.values()), "=", 0),
        ]
    shape = next(iter(cases.values()))
    setting = (
        f"{shape.workers} workers of {shape.sequences} sequences, a step {shape.step_ms:g} ms, prompts of "
        f"{shape.prompt} own tokens, {shape.answer} answered; {shape.seconds:g} s after {shape.settle_s:g}"
    )
    return Finding("shares", setting, tuple(rows), tuple(claims))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and show; 2 where the fleet does not start."""
    parser = argparse.ArgumentParser(prog="bench.shares", description=__doc__)
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--case", choices=("all", *CASES), default="all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    sizes = {"routers": arguments.routers, "workers": arguments.workers, "seconds": arguments.seconds}
    names = CASES if arguments.case == "all" else (arguments.case,)
    try:
        finding = compare({name: replace(CASES[name], **sizes) for name in names})
    except ConfigError as error:
        print(f"bench.shares: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(finding.document()))
    else:
        show([finding])
    return 0 if finding.met else 1


async def _ask_all(shape: SharesShape, targets: Sequence[str]) -> dict[str, Served]:
    begins = time.monotonic() + shape.settle_s
    window = begins, begins + shape.seconds
    callers = {tenant: Callers(shape, tenant, targets, window) for tenant in shape.weights}
    await asyncio.gather(*(one.run() for one in callers.values()))
    return {tenant: one.served for tenant, one in callers.items()}


if __name__ == "__main__":
    sys.exit(main())
