"""What blocks cost from one worker process to another over gRPC, and what a copy through shared memory would.

Each worker is a child process that runs engine, link server and CPU tier as `worker.process` does, and says on request
which bytes it has of a prompt. Run by `bench.pull`; as a program it is such a child.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from bench.sharing.finding import Claim, Finding, Row
from kvstore.block_key import key_fingerprint
from kvstore.block_pool import BlockPool
from kvstore.exchange import Export
from kvstore.scope import Region, ScopeRoot
from pando.settings import WorkerSettings
from router.link_messages import AdmissionReport, PullOrder, SamplingChoice, Submission, WorkerHello
from router.placement import PullRates
from router.pulls import PullMeter
from router.worker_link import WorkerLink
from worker.admission import SchedulerLimits
from worker.engine import Engine, StepReport
from worker.holdings import Holdings
from worker.offload import Offload
from worker.process import load_runner
from worker.scheduler import Scheduler
from worker.server import LinkServer, WorkerIdentity

BLOCK = 16
ROOT = ScopeRoot(b"bench of pulls 1")
REGIONS = (Region(ROOT, None),)
MEGA = 1e6
SHM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Kind:
    """A pair of workers: with pando-tiny, or simulated with blocks of so many bytes."""

    name: str
    block_bytes: int = 0
    num_blocks: tuple[int, ...] = (16, 64, 256)

    @property
    def settings(self) -> WorkerSettings:
        simulated = bool(self.block_bytes)
        return WorkerSettings(
            runner="simulated" if simulated else "model",
            device="cpu",
            device_blocks=1600,
            cpu_blocks=1600,
            max_batch_tokens=1024,
            threads=1,
            simulated_prefill_tokens_per_s=50_000.0,
            simulated_block_bytes=self.block_bytes,
        )


KINDS = (
    Kind("pando-tiny, float32", num_blocks=(16, 64, 128)),
    Kind("128 KiB a block", 128 * 1024),
    Kind("1 MiB a block", 1024 * 1024),
)


# The child


class _Served:
    """A worker without Redis whose blocks can be looked at."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._runner = load_runner(settings)
        spec, mover = self._runner.spec, self._runner.mover
        assert mover is not None
        self._mover = mover
        pool = BlockPool(spec.num_blocks, spec.block_size)
        self._offload = Offload(pool, mover)
        holdings = Holdings(pool, self._offload.tiers)
        limits = SchedulerLimits(settings.max_batch_tokens, 64, 1024, spec.max_model_len)
        scheduler = Scheduler(pool, limits, holdings=holdings, tiers=self._offload.tiers)
        self._engine = Engine(self._runner, pool, scheduler, self._on_step, holdings=holdings, offload=self._offload)
        fingerprint = key_fingerprint(spec.fingerprint, spec.block_size)
        self._identity = WorkerIdentity(
            "w", 1, spec.name, BLOCK, fingerprint, spec.max_model_len, spec.vocab_size, spec.num_blocks, os.getpid()
        )
        self._server: LinkServer | None = None

    def _on_step(self, report: StepReport) -> None:
        if self._server is not None:
            self._server.deliver(report)

    async def run(self) -> None:
        """Serve until the standard input ends; each line of it is a prompt, answered with digests of its blocks."""
        self._server = LinkServer(self._engine, self._identity, offload=self._offload)
        self._engine.start()
        address = await self._server.start("127.0.0.1", 0)
        print(json.dumps({"address": address, "fingerprint": self._identity.key_fingerprint}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await asyncio.to_thread(self._digests, array("I", json.loads(line)))), flush=True)
        await self._server.stop()
        self._engine.stop()
        self._runner.close()

    def _digests(self, token_ids: array[int]) -> list[str]:
        """Of each block of a prompt that is here, with its size before it."""
        exchange, export = self._offload.exchange, Export(REGIONS, token_ids, 0, len(token_ids) // BLOCK)
        self._engine.call(lambda: exchange.begin_export(export)).result()
        while not export.ready:
            time.sleep(0.005)
            self._engine.call(lambda: exchange.advance(export)).result()
        found = [self._mover.read(row) for row in export.rows]
        self._engine.call(lambda: exchange.end_export(export)).result()
        return [f"{len(payload)} {xxh3_64_hexdigest(payload)}" for payload in found if payload is not None]


# The bench


@dataclass(frozen=True, slots=True)
class Pulled:
    """One pull that brought all it was to bring."""

    num_blocks: int
    num_bytes: int
    seconds: float
    differing: int


class _Worker:
    """A child, and a link to it."""

    def __init__(self, kind: Kind, parts: ExitStack) -> None:
        command = [sys.executable, "-m", "bench.pull_transfer", json.dumps(asdict(kind))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        parts.callback(self._end)
        said = self._line()
        self.address: str = said["address"]
        hello = WorkerHello("w", 1, BLOCK, said["fingerprint"])
        self.link = WorkerLink(self.address, router="bench", expected=hello)

    def digests(self, token_ids: array[int]) -> list[str]:
        """Of what it has of a prompt."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(token_ids.tolist()) + "\n")
        self._process.stdin.flush()
        return list(self._line())

    async def ask(self, token_ids: array[int], pull: PullOrder | None = None) -> AdmissionReport:
        """Have a prompt computed."""
        request = Submission(
            request_id="bench",
            attempt=1,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            regions=REGIONS,
            owners=(ROOT,),
            sampling=SamplingChoice(max_tokens=1),
            priority=0,
            timeout_s=60.0,
            no_store=False,
            pull=pull,
        )
        stream = self.link.submit(request)
        admission = None
        while True:
            for output in await stream.take():
                admission = admission or output.admission
                if output.finish is not None:
                    assert admission is not None and output.finish in ("length", "stop"), output
                    return admission

    def _line(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


async def pulls(kind: Kind, rounds: int) -> list[Pulled]:
    """Prompts computed by one worker and pulled by the other, `rounds` of each length."""
    rng = random.Random(3)
    with ExitStack() as parts:
        source, target = _Worker(kind, parts), _Worker(kind, parts)
        for worker in (source, target):
            worker.link.start()
            while not worker.link.live:
                await asyncio.sleep(0.01)
        found = []
        for number in range(-1, rounds):  # the first connects, and counts for nothing
            for num_blocks in kind.num_blocks:
                token_ids = array("I", (rng.randrange(10, 2000) for _ in range(num_blocks * BLOCK + 1)))
                await source.ask(token_ids)
                admission = await target.ask(token_ids, PullOrder(source.address, 1, num_blocks, 25.0))
                if admission.pulled_tokens != num_blocks * BLOCK:
                    raise RuntimeError(f"of {num_blocks * BLOCK} tokens {admission.pulled_tokens} came")
                sent, kept = source.digests(token_ids), target.digests(token_ids)
                num_bytes = sum(int(each.split()[0]) for each in sent)
                differing = sum(one != other for one, other in zip(sent, kept, strict=True))
                if number >= 0:
                    found.append(Pulled(num_blocks, num_bytes, admission.pull_s, differing))
        for worker in (source, target):
            await worker.link.stop()
    return found


def shared_memory_s(num_bytes: int = SHM_BYTES, rounds: int = 200) -> float:
    """Seconds a megabyte through memory that two processes share: in, out, and the checksum on both sides."""
    source, target, shared = (mmap.mmap(-1, num_bytes) for _ in range(3))
    source.write(random.Random(1).randbytes(num_bytes))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        shared[:] = memoryview(source)
        sent = xxh3_64_intdigest(memoryview(shared))
        target[:] = memoryview(shared)
        same = sent == xxh3_64_intdigest(memoryview(target))
        times.append(time.perf_counter() - began)
        if not same:
            raise RuntimeError("a copy differs from its source")
    return statistics.median(times) / (num_bytes / MEGA)


def run(kinds: Sequence[Kind], rounds: int) -> tuple[Finding, Finding]:
    """The pulls, with the line fitted through them; and the copy beside the largest blocks."""
    rows: list[Row] = []
    differing, errors, grpc_s = 0, [], 0.0
    for kind in kinds:
        found = asyncio.run(pulls(kind, rounds))
        differing += sum(one.differing for one in found)
        rates = _fitted(found)
        for num_blocks in kind.num_blocks:
            alike = [one for one in found if one.num_blocks == num_blocks]
            median = statistics.median(one.seconds for one in alike)
            fitted = rates.start_s + num_blocks * BLOCK * rates.s_per_token
            errors.append(abs(fitted / median - 1))
            grpc_s = median / (alike[0].num_bytes / MEGA)
            rows.append(
                {
                    "blocks of": kind.name,
                    "blocks": num_blocks,
                    "bytes/block": alike[0].num_bytes // num_blocks,
                    "pull ms": round(1e3 * median, 1),
                    "us/block": round(1e6 * median / num_blocks),
                    "MB/s": round(1 / grpc_s, 1),
                    "start ms, fitted": round(1e3 * rates.start_s, 2),
                    "us/token, fitted": round(1e6 * rates.s_per_token, 2),
                }
            )
    copy_s = shared_memory_s()
    setting = f"two worker processes on one machine, {rounds} pulls of each length, medians; blocks of {BLOCK} tokens"
    claims = (
        Claim("blocks whose bytes differ at the two workers", differing, "=", 0),
        Claim("fitted line against the medians, median error", round(statistics.median(errors), 3), "<=", 0.25),
    )
    ways: tuple[Row, ...] = (
        {"by": "gRPC, the largest pull above", "ms/MB": round(1e3 * grpc_s, 3)},
        {"by": "shared memory: copied in and out, both checksums", "ms/MB": round(1e3 * copy_s, 3)},
    )
    shortcut = Claim("gRPC / shared memory", round(grpc_s / copy_s, 1), ">", 1.0)
    return (
        Finding("transfer", setting, tuple(rows), claims),
        Finding("shortcut", "a megabyte from one worker to another on the same machine", ways, (shortcut,)),
    )


def _fitted(found: Sequence[Pulled]) -> PullRates:
    """As a router fits it."""
    meter = PullMeter()
    for one in found:
        meter.add(one.num_blocks * BLOCK, one.seconds, 1.0)
    return meter.rates(1e-4, 1.0)


def main() -> None:
    """A child."""
    kind = Kind(**json.loads(sys.argv[1]))
    asyncio.run(_Served(replace(kind.settings, worker_id="w")).run())


if __name__ == "__main__":
    main()
