"""n answers end to end: client, router and worker on real ports; one prefill, shared and private blocks by count."""

from __future__ import annotations

import asyncio
import random
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

import pando
from pando.admin_client import AdminClient
from pando.settings import RouterSettings, WorkerSettings
from router.generation import derived_seed
from router.process import Listening, RouterProcess
from tests.conftest import RedisServer
from worker.process import WorkerProcess

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

BLOCK = 16
N = 8


@dataclass
class House:
    """A router and one worker."""

    listening: Listening
    worker_metrics: str

    def held(self) -> tuple[int, int]:
        """Sequences that run on the worker, and blocks that they hold."""
        with AdminClient(self.listening.admin) as admin:
            (worker,) = admin.workers()
        return worker.running, worker.device_blocks - worker.free_blocks - worker.cached_blocks

    def computed(self) -> float:
        """Prompt tokens that the worker has computed."""
        with urllib.request.urlopen(self.worker_metrics, timeout=5) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        (family,) = (family for family in families if family.name == "pando_prompt_tokens")
        return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


@asynccontextmanager
async def house(server: RedisServer, metrics_port: int, **settings: object) -> AsyncIterator[House]:
    worker = WorkerProcess(
        WorkerSettings(
            runner="simulated",
            redis=server.url,
            device_blocks=200,
            worker_metrics_port=metrics_port,
            **settings,  # type: ignore[arg-type]
        )
    )
    router = RouterProcess(RouterSettings(redis=server.url, port=0, http_port=0, admin_port=0))
    try:
        await asyncio.to_thread(worker.start)
        yield House(await router.start(), f"http://127.0.0.1:{metrics_port}/metrics")
    finally:
        await router.stop()
        worker.stop()


def prompt(length: int) -> list[int]:
    rng = random.Random(3)
    return [rng.randrange(10, 2000) for _ in range(length)]


HOW = {"temperature": 1.0, "ignore_eos": True}


async def test_n_answers_cost_one_prefill_and_hold_shared_and_private_blocks(
    own_redis: RedisServer, free_port: Callable[[], int]
) -> None:
    tokens, length = prompt(53), 28
    shared, per_answer = len(tokens) // BLOCK, -(-(len(tokens) + length - 1) // BLOCK)
    private = N * (per_answer - shared)
    # Without a prefix cache nothing is shared but what forks share.
    settings = {"prefix_cache": "off", "simulated_step_ms": 20.0}
    async with (
        house(own_redis, free_port(), **settings) as it,
        pando.AsyncClient(it.listening.grpc, tenant="a") as client,
    ):
        before = it.computed()
        call = asyncio.create_task(client.generate(token_ids=tokens, max_tokens=length, n=N, seed=5, **HOW))
        seen = []
        while not call.done():
            seen.append(await asyncio.to_thread(it.held))
            await asyncio.sleep(0.01)
        result = await call
        assert max(seen) == (N, shared + private)
        assert it.computed() - before == len(tokens)
        usage = result.usage
        assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (len(tokens), 0, N * length)
        for answer in result.answers:
            how = HOW | {"seed": derived_seed(5, answer.index)}
            alone = await client.generate(token_ids=tokens, max_tokens=length, **how)
            assert alone.token_ids == answer.token_ids
        assert len({tuple(answer.token_ids) for answer in result.answers}) == N


async def test_computed_and_cached_tokens_are_the_prompt(own_redis: RedisServer, free_port: Callable[[], int]) -> None:
    tokens = prompt(101)
    async with house(own_redis, free_port()) as it, pando.AsyncClient(it.listening.grpc, tenant="a") as client:
        await client.generate(token_ids=tokens[:70], max_tokens=1, **HOW)
        for _ in range(2):
            before = it.computed()
            usage = (await client.generate(token_ids=tokens, max_tokens=3, n=N, **HOW)).usage
            assert usage.cached_tokens >= 64
            assert it.computed() - before + usage.cached_tokens == usage.prompt_tokens == len(tokens)
