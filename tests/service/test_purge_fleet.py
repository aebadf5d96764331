"""PurgeTenant on real parts: two workers with a CPU tier, Redis, a token on the link. What is gone is counted apart."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import pytest

import pando
from kvstore.block_key import block_keys
from kvstore.events import CPU, DEVICE
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from kvstore.scope import Region, TenantId, scope_root, tenant_scope
from pando.errors import Unavailable
from pando.v1 import admin_pb2, admin_pb2_grpc
from tests.fleet_processes import CLUSTER, SECRET, Child, Fleet, fleet_of, some_tokens, until

pytestmark = pytest.mark.timeout(110)

BLOCK = 16
TENANTS = {"alice": 'publish = ["own", "public"]', "bob": "", "carol": ""}
PROMPTS = [some_tokens(seed, 10 * BLOCK) for seed in range(24)]
FLAGS = ("--device-blocks", "100", "--cpu-blocks", "1000", "--simulated-step-ms", "3")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("purge")
    with fleet_of(folder, TENANTS, *FLAGS, env={"PANDO_LINK_TOKEN": "token-of-the-links"}) as made:
        yield made


@pytest.fixture(scope="module")
def router(fleet: Fleet) -> Child:
    return fleet.router()


def admin(router: Child, method: str, request: Any) -> Any:
    with grpc.insecure_channel(router.ready["admin"]) as channel:
        return getattr(admin_pb2_grpc.AdminStub(channel), method)(request, timeout=20)


def purge(router: Child, tenant: str) -> admin_pb2.PurgeTenantResponse:
    answer: admin_pb2.PurgeTenantResponse = admin(router, "PurgeTenant", admin_pb2.PurgeTenantRequest(tenant=tenant))
    return answer


def workers(router: Child) -> list[admin_pb2.Worker]:
    return list(admin(router, "ListWorkers", admin_pb2.ListWorkersRequest()).workers)


def held(fleet: Fleet) -> Counter[tuple[str, str, int]]:
    """What Redis says now: blocks of the prompts by (tenant, worker, tier), and all others under no tenant's name."""

    async def read() -> tuple[MemoryIndex, bytes]:
        index = MemoryIndex()
        mirror = Mirror(fleet.redis.url, CLUSTER, index)
        await mirror.start()
        await mirror.stop()
        [fingerprint] = {lease.model_fingerprint for lease in mirror.leases().values()}
        return index, bytes.fromhex(fingerprint)

    index, fingerprint = asyncio.run(read())
    counts: Counter[tuple[str, str, int]] = Counter()
    for worker in index.workers():
        for tier in (DEVICE, CPU):
            found = index.keys_of(worker, tier)
            for tenant in TENANTS:
                root = scope_root(SECRET.encode(), fingerprint, tenant_scope(TenantId(tenant)), block_size=BLOCK)
                for prompt in PROMPTS:
                    mine = {*block_keys((Region(root, None),), array("I", prompt), BLOCK)} & found
                    counts[tenant, worker, tier] += len(mine)
                    found -= mine
            counts["", worker, tier] = len(found)
    return counts


def cached(client: pando.Client, prompt: list[int]) -> int:
    return client.generate(token_ids=prompt, max_tokens=1, temperature=0.0).usage.cached_tokens


def warm(fleet: Fleet, router: Child) -> Counter[tuple[str, str, int]]:
    """The same prompts by both tenants, side by side, more than the devices hold; what lies where in the end."""
    for tenant in ("alice", "bob"):
        with fleet.client(router, tenant) as client, ThreadPoolExecutor(8) as threads:
            list(threads.map(partial(cached, client), PROMPTS))
    return settled(fleet)


def settled(fleet: Fleet) -> Counter[tuple[str, str, int]]:
    """What lies where once idle workers have copied what they wanted to."""
    before, now = None, held(fleet)
    while now != before:
        time.sleep(0.3)
        before, now = now, held(fleet)
    return now


def of(counts: Counter[tuple[str, str, int]], tenant: str) -> dict[tuple[str, int], int]:
    return {(worker, tier): count for (name, worker, tier), count in counts.items() if name == tenant}


def test_a_purge_is_one_tenants_on_every_worker_and_tier(fleet: Fleet, router: Child) -> None:
    before = warm(fleet, router)
    alice_had, bob_had = of(before, "alice"), of(before, "bob")
    places = {(worker, tier) for worker in ("w0", "w1") for tier in (DEVICE, CPU)}
    assert {place for place, count in bob_had.items() if count} == places
    assert {place for place, count in alice_had.items() if count} >= {("w0", CPU), ("w1", CPU)}

    answer = purge(router, "alice")

    by_tier = {tier: sum(count for (_, at), count in alice_had.items() if at == tier) for tier in (DEVICE, CPU)}
    assert (answer.device_blocks, answer.cpu_blocks) == (by_tier[DEVICE], by_tier[CPU])
    assert (answer.workers, answer.remaining_blocks, answer.prefixes) == (2, 0, 0)
    after = settled(fleet)
    assert not any(of(after, "alice").values())
    # With room again, idle workers copy more of what is cached; nothing of anybody else's is gone.
    assert all(of(after, "bob")[place] >= count for place, count in bob_had.items())
    assert {worker.id: worker.indexed_blocks for worker in workers(router)} == {
        name: sum(count for (_, at, _), count in after.items() if at == name) for name in ("w0", "w1")
    }

    again = purge(router, "alice")
    assert (again.device_blocks, again.cpu_blocks, again.workers) == (0, 0, 2)
    with fleet.client(router, "alice") as alice, fleet.client(router, "bob") as bob:
        # Those asked last are on a device, where the router finds them, and asking for them drives nothing out.
        hits = [cached(bob, prompt) for prompt in reversed(PROMPTS)]
        assert min(hits[:4]) >= 9 * BLOCK
        usage = alice.generate(token_ids=PROMPTS[0], max_tokens=1, temperature=0.0).usage
        assert (usage.cached_tokens, usage.predicted_cached_tokens, usage.blocks_copied) == (0, 0, 0)
        assert [cached(alice, prompt) for prompt in PROMPTS[1:]] == [0] * (len(PROMPTS) - 1)


def test_what_the_tenant_published_goes_with_it(fleet: Fleet, router: Child) -> None:
    head, tail = some_tokens(100, 5 * BLOCK), some_tokens(101, 40)
    with fleet.client(router, "alice") as alice, fleet.client(router, "bob") as bob:
        alice.publish_prefix(token_ids=head, scope="public", warm=True, copies=2)
        assert bob.generate(token_ids=head + tail, max_tokens=1).usage.cached_published == len(head)
        answer = purge(router, "alice")
        assert answer.prefixes == 1 and answer.device_blocks >= 2 * len(head) // BLOCK
        assert bob.list_prefixes() == ()
        usage = bob.generate(token_ids=head + tail, max_tokens=1).usage
        assert (usage.cached_published, usage.cached_tokens) == (0, 0)


def test_its_running_requests_end_and_all_workers_stay(fleet: Fleet, router: Child) -> None:
    with fleet.client(router, "alice") as alice, fleet.client(router, "bob") as bob:
        streams = []
        while not all(worker.running for worker in workers(router)):
            assert len(streams) < 64
            prompt = some_tokens(200 + len(streams), 40)
            streams += [one.stream(token_ids=prompt, max_tokens=400, ignore_eos=True) for one in (alice, bob)]
            assert all(next(stream).token_ids for stream in streams[-2:])
        assert purge(router, "alice").remaining_blocks == 0
        for stream in streams[::2]:
            with pytest.raises(Unavailable) as ended:
                list(stream)
            assert ended.value.reason == "PURGED"
        ends = [list(stream)[-1].usage for stream in streams[1::2]]
        assert [usage and usage.completion_tokens for usage in ends] == [400] * len(ends)
        assert {worker.state for worker in workers(router)} == {admin_pb2.WORKER_STATE_READY}
        assert cached(alice, some_tokens(200, 40)) == 0
        found = {tenant.id: tenant for tenant in admin(router, "ListTenants", admin_pb2.ListTenantsRequest()).tenants}
        assert found["alice"].in_flight == 0


@pytest.mark.parametrize("name", ["nobody", "carol"])
def test_a_tenant_that_has_nothing_is_purged_all_the_same(router: Child, name: str) -> None:
    answer = purge(router, name)
    assert (answer.device_blocks, answer.cpu_blocks, answer.workers) == (0, 0, 2)


def test_a_worker_that_does_not_answer_is_named(fleet: Fleet, router: Child) -> None:
    """Last: it ends a worker, whose lease lives on for a moment."""
    fleet.workers[1].process.kill()
    with pytest.raises(grpc.RpcError) as failed:
        purge(router, "alice")
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert failed.value.details() == "not purged: no answer from w1"  # type: ignore[attr-defined]
    until(lambda: [worker.id for worker in workers(router)] == ["w0"])
    assert purge(router, "alice").workers == 1
