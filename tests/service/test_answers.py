"""What answers take, end to end on real ports: n of them one prefill, an endless one no more than its window."""

from __future__ import annotations

import asyncio
import random
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import pando
from pando.admin_client import AdminClient
from pando.errors import InvalidRequest
from pando.model_folder import resolve_model
from pando.settings import RouterSettings, WorkerSettings
from router.generation import derived_seed
from router.model_card import read_model_card
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

    async def watched(self, call: asyncio.Task[Any]) -> tuple[int, int]:
        """The most that `held` says until `call` is done."""
        seen = [(0, 0)]
        while not call.done():
            seen.append(await asyncio.to_thread(self.held))
            await asyncio.sleep(0.01)
        return max(seen)

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
            worker_metrics_port=metrics_port,
            **{"device_blocks": 200} | settings,  # type: ignore[arg-type]
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
        most = await it.watched(call)
        result = await call
        assert most == (N, shared + private)
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


async def test_a_window_lifts_the_models_context_and_bounds_the_blocks(
    own_redis: RedisServer, free_port: Callable[[], int]
) -> None:
    own = read_model_card("pando-tiny", resolve_model("pando-tiny")).context_length
    window, sinks, step = 64, 4, 32
    settings = {"window": window, "sinks": sinks, "max_batch_tokens": step, "simulated_step_ms": 0.0}
    pool = -(-(sinks + 2 * (window + step + BLOCK)) // BLOCK)  # all that the longest needs
    async with (
        house(own_redis, free_port(), device_blocks=2 * pool, **settings) as it,
        pando.AsyncClient(it.listening.grpc, tenant="a", timeout=60) as client,
    ):
        (model,) = await client.list_models()
        assert model.context_length > 100 * own
        call = asyncio.create_task(client.generate(token_ids=prompt(100), max_tokens=own + 1, **HOW))
        running, held = await it.watched(call)
        result = await call
        assert (result.finish_reason, len(result.token_ids)) == ("length", own + 1)
        assert running == 1 and window // BLOCK < held <= pool
        text = await client.generate(text="so many words " * own, max_tokens=1, **HOW)
        assert text.usage.prompt_tokens > own
        with pytest.raises(InvalidRequest, match=f"do not fit a context of {model.context_length}"):
            await client.generate(token_ids=prompt(100), max_tokens=model.context_length)


async def test_without_a_window_the_models_context_is_the_limit(
    own_redis: RedisServer, free_port: Callable[[], int]
) -> None:
    own = read_model_card("pando-tiny", resolve_model("pando-tiny")).context_length
    async with (
        house(own_redis, free_port(), device_blocks=2 * own // BLOCK) as it,
        pando.AsyncClient(it.listening.grpc, tenant="a") as client,
    ):
        with pytest.raises(InvalidRequest, match=f"do not fit a context of {own}"):
            await client.generate(token_ids=prompt(100), max_tokens=own - 99)
        stream = client.stream(token_ids=prompt(100), max_tokens=own - 100)
        assert (await anext(stream)).token_ids
        await stream.aclose()
