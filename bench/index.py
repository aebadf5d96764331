"""The prefix index at scale: longest match, events, cold start and memory, with a real Redis; peers beside it.

Run as `python -m bench.index [--json] [--blocks N] [--part NAME ...]`. Exit code 1 if a claim is missed. Times depend
on the machine and on what else runs there: `cpu s` is the processor time of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench import index_peers
from bench.index_load import CHAIN, Fleet, best_of, keys, make_fleet
from bench.sharing.__main__ import show
from bench.sharing.finding import Claim, Finding, Row
from control.redis_server import RedisServer
from kvstore.block import BlockKey, WorkerId
from kvstore.events import BlocksRemoved, BlocksStored, Event, EventBatch, decode, encode
from kvstore.lease import Lease, LeaseKeeper, connect, take_epoch
from kvstore.ledger import Ledger
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from kvstore.redis_index import RedisIndexWriter

CLUSTER = "bench"
MATCH_BOUND_US = {8: 5.0, 64: 10.0}
LAG_BATCHES = 400


def match(num_blocks: int) -> Finding:
    """Longest match over `num_blocks`, ours and every peer's, on the same blocks."""
    rows: list[Row] = []
    claims: list[Claim] = []
    absent: list[str] = []
    for workers, bound in MATCH_BOUND_US.items():
        for shape in ("whole", "head", "spread"):
            fleet = make_fleet(shape, workers, num_blocks)
            row = _ours(fleet)
            peers, absent = index_peers.measure(fleet)
            rows += [row, *peers]
            us = float(row["match us"])
            if shape == "spread":  # shown, and no claim: every worker ends elsewhere
                continue
            claims.append(Claim(f"{shape}, {workers} workers: us a match", us, "<=", bound))
            claims += [
                Claim(f"{shape}, {workers} workers: us, ours against {peer['index']}", us, "<", float(peer["match us"]))
                for peer in peers
            ]
    setting = f"{num_blocks:,} blocks, a prompt of {len(fleet.query)} blocks, best of several rounds"
    missing = f"; absent: {', '.join(absent)}" if absent else ""
    return Finding("match", setting + missing, tuple(rows), tuple(claims))


def _ours(fleet: Fleet) -> Row:
    index = MemoryIndex()
    payloads = [
        (WorkerId(f"w{worker}"), encode(EventBatch(f"w{worker}", 1, 1, [BlocksStored(chain)])))
        for worker, chains in enumerate(fleet.chains_of)
        for chain in chains
    ]
    began = time.perf_counter()
    for name, payload in payloads:
        index.apply(name, 1, decode(payload).events)
    took = time.perf_counter() - began
    query = [BlockKey(key) for key in fleet.query]
    assert sorted({prefix.num_blocks for prefix in index.match(query).values()}) == fleet.depths()
    return {"index": "Pando MemoryIndex", "workers": len(fleet.chains_of), "shape": fleet.shape,
            "match us": round(best_of(lambda: index.match(query)) * 1e6, 1),
            "M blocks/s": round(fleet.num_blocks / took / 1e6, 2)}  # fmt: skip


def events(num_blocks: int) -> Finding:
    """Blocks a second through a worker's ledger, and decoded and applied at a router: half of them removed again."""
    rng = random.Random(2)
    chains = [keys(rng, CHAIN) for _ in range(num_blocks // CHAIN)]
    batches: list[list[Event]] = [[BlocksStored(chain)] for chain in chains]
    batches += [[BlocksRemoved(chain)] for chain in chains[::2]]
    total = CHAIN * len(batches)
    ledger = Ledger("w", 1)
    payloads: list[bytes] = []
    ledger.follow(lambda told: payloads.extend(told if isinstance(told, list) else ()), 0)
    cpu, wall = _timed(lambda: [ledger.record(batch) for batch in batches])
    index = MemoryIndex()
    worker = WorkerId("w")

    def apply() -> None:
        for payload in payloads:
            index.apply(worker, 1, decode(payload).events)

    cpu_apply, wall_apply = _timed(apply)
    assert index.digest(worker) == ledger.position.digest
    rows: tuple[Row, ...] = (
        {"what": "recorded by a worker", "blocks": total, "wall s": round(wall, 2), "cpu s": round(cpu, 2)},
        {
            "what": "decoded and applied by a router",
            "blocks": total,
            "wall s": round(wall_apply, 2),
            "cpu s": round(cpu_apply, 2),
        },
    )
    claim = Claim("M blocks applied a second", round(total / wall_apply / 1e6, 2), ">=", 0.5)
    return Finding("events", f"batches of {CHAIN} blocks, digests kept", rows, (claim,))


def redis_part(num_blocks: int, num_workers: int = 8) -> Finding:
    """Twice `num_blocks` in a Redis of our own: written by snapshots, read by a router that starts; then event lag."""
    server = RedisServer()
    try:
        server.start()
        client = connect(server.url, timeout_s=5.0)
        client.ping()
        empty = _used(client)
        writers = [_writer(client, f"w{number}", 2 * num_blocks // num_workers) for number in range(num_workers)]
        before = _cpu(client)
        cpu_written, wall_written = _timed(lambda: [writer.repair() for writer in writers])
        redis_written = _cpu(client) - before
        for writer in writers:
            _renew(client, writer)
        total = sum(writer.ledger.position.num_blocks for writer in writers)
        bytes_a_block = (_used(client) - empty) / total
        before = _cpu(client)
        cold, lags, after = asyncio.run(_follow(server.url, writers, lambda: _cpu(client)))
        client.close()
    finally:
        server.stop()
    p99 = sorted(lags)[len(lags) * 99 // 100] * 1e3
    rows: tuple[Row, ...] = (
        _row("snapshots written", total, (cpu_written, wall_written), redis_written),
        _row("cold start of a router", total, cold, after - before),
        _row("event to mirror, p50", 8, (0.0, sorted(lags)[len(lags) // 2]), 0.0),
        _row("event to mirror, p99", 8, (0.0, p99 / 1e3), 0.0),
    )
    claims = (
        Claim(f"cold start of {total:,} blocks, s", round(cold[1], 2), "<=", 5.0),
        Claim("bytes a block in Redis", round(bytes_a_block, 1), "<=", 30.0),
        Claim("s to write 1 M blocks again", round(wall_written * 1e6 / total, 2), "<=", 10.0),
        Claim("event to mirror p99, ms", round(p99, 2), "<=", 100.0),
    )
    return Finding("redis", f"{num_workers} workers, one Redis, one router", rows, claims)


def _row(what: str, blocks: int, cpu_and_wall: tuple[float, float], redis_cpu: float) -> Row:
    cpu, wall = cpu_and_wall
    return {"what": what, "blocks": blocks, "wall s": round(wall, 4), "cpu s": round(cpu, 2),
            "Redis cpu s": round(redis_cpu, 2)}  # fmt: skip


def _cpu(client: Any) -> float:
    """Seconds of processor time that the server has used."""
    spent = client.info("cpu")
    assert isinstance(spent, dict)
    return float(spent["used_cpu_user"]) + float(spent["used_cpu_sys"])


def _writer(client: Any, name: str, num_blocks: int) -> RedisIndexWriter:
    ledger = Ledger(name, take_epoch(client, CLUSTER, name))
    rng = random.Random(name)
    ledger.record([BlocksStored(keys(rng, num_blocks))])
    return RedisIndexWriter(client, CLUSTER, ledger, capacity=num_blocks)


def _renew(client: Any, writer: RedisIndexWriter) -> None:
    at = writer.acknowledged
    lease = Lease(
        worker_id=writer.ledger.worker_id, epoch=writer.ledger.epoch, address="", model="", block_size=16,
        key_fingerprint="", model_fingerprint="", pid=1, device_blocks=1, max_model_len=1, vocab_size=1,
        seq=at.seq, num_blocks=at.num_blocks, digest=at.digest,
    )  # fmt: skip
    LeaseKeeper(client, CLUSTER, ttl_s=600.0).renew(lease)


async def _follow(
    url: str, writers: Sequence[RedisIndexWriter], redis_cpu: Callable[[], float]
) -> tuple[tuple[float, float], list[float], float]:
    """(cpu, wall) seconds until a new mirror has everything, seconds from publishing each of some batches to its being
    applied, and what `redis_cpu` said between."""
    index = MemoryIndex()
    mirror = Mirror(url, CLUSTER, index)
    began, cpu = time.perf_counter(), time.process_time()
    await mirror.start()
    cold = time.process_time() - cpu, time.perf_counter() - began
    after = redis_cpu()
    for writer in writers:
        assert index.digest(WorkerId(writer.ledger.worker_id)) == writer.ledger.position.digest
    rng = random.Random(3)
    lags = []
    for number in range(LAG_BATCHES):
        writer = writers[number % len(writers)]
        name = WorkerId(writer.ledger.worker_id)
        began = time.perf_counter()
        await asyncio.to_thread(writer.publish, [BlocksStored(keys(rng, 8))])
        while mirror.position()[name][1] < writer.ledger.position.seq:
            await asyncio.sleep(0.0002)
        lags.append(time.perf_counter() - began)
    await mirror.stop()
    return cold, lags, after


def _used(client: Any) -> int:
    memory = client.info("memory")
    assert isinstance(memory, dict)
    return int(memory["used_memory"])


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """(cpu, wall) seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


PARTS = {"match": match, "events": events, "redis": redis_part}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and show it."""
    parser = argparse.ArgumentParser(prog="bench.index", description=__doc__)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    found = [PARTS[name](arguments.blocks) for name in arguments.part]
    if arguments.json:
        print(json.dumps([finding.document() for finding in found]))
    else:
        show(found)
    return 0 if all(finding.met for finding in found) else 1


if __name__ == "__main__":
    sys.exit(main())
