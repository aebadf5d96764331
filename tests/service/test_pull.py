"""Pulls on real parts: routers, two simulated workers with a CPU tier, Redis. A busy worker gives to an idle one."""

from __future__ import annotations

import asyncio
import subprocess
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import redis

from kvstore.block import WorkerId
from kvstore.events import CPU
from kvstore.lease import Lease, redis_key
from kvstore.planted import planted_keys
from kvstore.scope import TenantId
from pando.errors import Unavailable
from pando.v1 import admin_pb2, admin_pb2_grpc, inference_pb2
from pando.worker.v1 import worker_pb2 as pb
from pando.worker.v1 import worker_pb2_grpc
from router.dispatch import TokenDelta
from router.link_messages import AdmissionReport
from router.scopes import Scopes
from tests.fleet_processes import CLUSTER, Fleet, counters, fleet_of, some_tokens
from tests.service.test_routing import (
    Router,
    WorkerChild,
    full_blocks,
    launch,
    launched,
    prompt,
    router_on,
    tokens_of,
    two_workers,
)
from tests.service.test_worker_link import Client

pytestmark = pytest.mark.timeout(110)

LENGTH = 2000
FLAGS: dict[str, object] = {
    "cpu_blocks": 1500,
    "simulated_prefill_tokens_per_s": 3000,
    "heartbeat_s": 0.1,
}
SLOW: dict[str, object] = FLAGS | {"simulated_block_bytes": 4 * 1024 * 1024}
"""Blocks so large that their transfer takes a while."""


# Below text, where it can be said which worker computes first


@asynccontextmanager
async def warm_and_busy(
    url: str, children: dict[str, WorkerChild], token_ids: array[int]
) -> AsyncIterator[tuple[Router, list[TokenDelta]]]:
    """A router, when w0 has the prompt and is busy with others; with it what w0 answers to the prompt."""
    async with router_on(url) as router:
        answer = await router.ask("a", token_ids, only=WorkerId("w0"))
        await router.until(lambda: router.index.num_blocks(WorkerId("w0")) >= len(token_ids) // 16)
        others = [
            asyncio.create_task(router.ask("b", prompt(900 + number, 4000), only=WorkerId("w0"))) for number in range(4)
        ]
        await router.until(lambda: router.fleet.workers()[0].queued_tokens > 8000)
        try:
            yield router, answer
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)


def admission_of(deltas: list[TokenDelta]) -> AdmissionReport:
    assert deltas[0].admission is not None
    return deltas[0].admission


@pytest.mark.asyncio
async def test_the_prefix_of_a_busy_worker_is_pulled_and_the_answer_is_the_same(_shared_redis: Any) -> None:
    token_ids = prompt(1, LENGTH)
    with two_workers(_shared_redis.url, **FLAGS) as children:
        async with warm_and_busy(_shared_redis.url, children, token_ids) as (router, expected):
            pulled = await router.ask("a", token_ids)
            assert (pulled[0].worker, tokens_of(pulled)) == ("w1", tokens_of(expected))
            found = admission_of(pulled)
            assert found.cached_remote == found.pulled_tokens == found.cached_tokens == full_blocks(LENGTH)
            assert pulled[0].predicted_cached == full_blocks(LENGTH) and found.pull_s > 0
            # Now it is on both, and another tenant's prompt with the same text is pulled from nobody.
            again = await router.ask("a", token_ids)
            assert again[0].worker == "w1" and admission_of(again).cached_remote == 0
            assert admission_of(again).cached_tokens >= full_blocks(LENGTH)
            strange = await router.ask("c", token_ids)
            assert admission_of(strange).cached_tokens == strange[0].predicted_cached == 0


@pytest.mark.asyncio
async def test_a_peer_that_is_killed_while_it_sends_costs_time_alone(_shared_redis: Any) -> None:
    token_ids = prompt(2, LENGTH)
    with two_workers(_shared_redis.url, **SLOW) as children:
        async with warm_and_busy(_shared_redis.url, children, token_ids) as (router, expected):
            asked = asyncio.create_task(router.ask("a", token_ids))
            await asyncio.sleep(0.2)
            children["w0"].kill()
            answer = await asked
            assert (answer[0].worker, tokens_of(answer)) == ("w1", tokens_of(expected))
            found = admission_of(answer)
            assert answer[0].predicted_cached == full_blocks(LENGTH)
            assert found.pull_s > 0 and found.cached_remote == found.pulled_tokens < full_blocks(LENGTH)
            assert not found.peer_lacks
            again = await router.ask("a", token_ids)
            assert tokens_of(again) == tokens_of(expected)


@pytest.mark.asyncio
async def test_a_purge_while_blocks_are_on_their_way_leaves_none(_shared_redis: Any) -> None:
    token_ids = prompt(3, LENGTH)
    with two_workers(_shared_redis.url, **SLOW) as children:
        async with warm_and_busy(_shared_redis.url, children, token_ids) as (router, expected):
            asked = asyncio.create_task(router.ask("a", token_ids))
            await asyncio.sleep(0.2)
            model = router.fleet.model_spec
            assert model is not None
            roots = Scopes(b"secret").roots_of(model, TenantId("a"), ())
            answers = await router.fleet.purge(roots, 10.0)
            assert all(answers.values())
            with pytest.raises(Unavailable):
                await asked
            await asyncio.sleep(0.5)  # what came late would have come
            planted = planted_keys(model.model_fingerprint, model.block_size)
            assert router.index.keys_of(WorkerId("w1")) == set(planted)
            assert not router.index.keys_of(WorkerId("w1"), CPU)
            clean = await router.ask("a", token_ids)
            assert admission_of(clean).cached_tokens == admission_of(clean).pulled_tokens == 0
            assert tokens_of(clean) == tokens_of(expected)


@pytest.mark.asyncio
async def test_workers_whose_blocks_differ_do_not_pull(_shared_redis: Any) -> None:
    token_ids = prompt(4, LENGTH)
    url = _shared_redis.url
    with stopped_at_the_end(
        launch(url, "w0", **FLAGS), launch(url, "w1", **FLAGS, simulated_block_bytes=999)
    ) as children:
        async with warm_and_busy(_shared_redis.url, children, token_ids) as (router, expected):
            computed = await router.ask("a", token_ids)
            assert (computed[0].worker, tokens_of(computed)) == ("w1", tokens_of(expected))
            assert admission_of(computed).cached_tokens == computed[0].predicted_cached == 0


@pytest.mark.asyncio
async def test_what_is_predicted_of_the_cpu_tier_is_what_is_found(_shared_redis: Any) -> None:
    """A prompt that others drove off the device is found on the CPU, as long as it was said to be."""
    token_ids = prompt(5, LENGTH)
    w0 = WorkerId("w0")
    with two_workers(_shared_redis.url, **(FLAGS | {"device_blocks": 300})) as children:
        assert children
        async with router_on(_shared_redis.url) as router:
            expected = await router.ask("a", token_ids, only=w0)
            for number in range(3):
                await router.ask("b", prompt(800 + number, 3000), only=w0)
            await router.until(lambda: router.index.num_blocks(w0) >= 600)
            answer = await router.ask("a", token_ids, only=w0)
            found = admission_of(answer)
            assert tokens_of(answer) == tokens_of(expected)
            assert found.cached_cpu > 0 and found.cached_remote == 0
            assert answer[0].predicted_cached == found.cached_device + found.cached_cpu == full_blocks(LENGTH)


@contextmanager
def stopped_at_the_end(*processes: subprocess.Popen[str]) -> Iterator[dict[str, WorkerChild]]:
    try:
        yield {child.ready["worker_id"]: child for child in map(launched, processes)}
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


# Through the doors


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    options = [part for name, value in FLAGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    folder: Path = tmp_path_factory.mktemp("pull")
    with fleet_of(folder, {"alice": ""}, *options, "--device-blocks", "1200") as made:
        yield made


async def keep_busy(fleet: Fleet, worker: str, done: asyncio.Event) -> None:
    """Long prompts sent to one worker by nobody that the router knows of, until `done`."""
    with redis.Redis.from_url(fleet.redis.url) as client:
        lease = msgspec.json.decode(client.get(redis_key(CLUSTER, worker, "lease")), type=Lease)
    async with grpc.aio.insecure_channel(lease.address) as channel:
        session = Client(worker_pb2_grpc.WorkerLinkStub(channel).Session())
        hello = pb.RouterHello(router="other", key_fingerprint=lease.key_fingerprint, epoch=lease.epoch)
        await session.send(hello=hello)
        for number in range(4):
            await session.submit(number, some_tokens(500 + number, 4000))
        await done.wait()
        session.call.cancel()


def explained(admin: str, tokens: list[int]) -> admin_pb2.ExplainPlacementResponse:
    asked = admin_pb2.ExplainPlacementRequest(tenant="alice", token_ids=inference_pb2.TokenIds(ids=tokens))
    with grpc.insecure_channel(admin) as channel:
        answer: admin_pb2.ExplainPlacementResponse = admin_pb2_grpc.AdminStub(channel).ExplainPlacement(asked)
    return answer


def test_usage_explanation_and_counters_tell_of_a_pull(fleet: Fleet) -> None:
    tokens = some_tokens(1, LENGTH)
    router = fleet.router()
    admin = router.ready["admin"]

    async def ask() -> None:
        done = asyncio.Event()
        with fleet.client(router, "alice") as client:
            first = client.generate(token_ids=tokens, max_tokens=4, ignore_eos=True)
            holder = first.usage.worker
            [other] = {"w0", "w1"} - {holder}
            busy = asyncio.create_task(keep_busy(fleet, holder, done))
            began = time.monotonic()
            while (said := explained(admin, tokens)).worker != other:
                assert time.monotonic() - began < 10, said
                await asyncio.sleep(0.05)
            row = said.candidates[0]
            assert (row.plan, row.pull_from, row.cached_tokens) == ("pull", holder, full_blocks(LENGTH))
            pulled = await asyncio.to_thread(client.generate, token_ids=tokens, max_tokens=4, ignore_eos=True)
            done.set()
            await busy
        usage = pulled.usage
        assert usage.worker == other and pulled.answers[0].token_ids == first.answers[0].token_ids
        assert (usage.cached_device, usage.cached_cpu, usage.cached_remote) == (0, 0, full_blocks(LENGTH))
        assert usage.cached_tokens == usage.predicted_cached_tokens == full_blocks(LENGTH)

    asyncio.run(ask())
    told = counters(router.ready["http"], "pando_router_")
    assert told["cached_tokens", "alice", "remote"] == full_blocks(LENGTH)
