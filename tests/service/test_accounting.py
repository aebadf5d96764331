"""What usage says and what is counted are one: by tenant, tier and scope, on routers and on workers.

Real parts: simulated workers with a CPU tier, Redis, a router that counts from zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

import pando
from tests.fleet_processes import Child, Fleet, counters, fleet_of, some_tokens, until

pytestmark = pytest.mark.timeout(110)

TENANTS = {"alice": 'publish = ["own", "public"]', "bob": "", "carol": ""}
HEAD = some_tokens(50, 112)
STEPS = ("--max-batch-tokens", "32", "--simulated-step-ms", "2", "--simulated-prefill-tokens-per-s", "4000")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("accounting")
    with fleet_of(folder, TENANTS, "--device-blocks", "40", "--cpu-blocks", "500", *STEPS) as made:
        yield made


@pytest.fixture
def router(fleet: Fleet) -> Iterator[Child]:
    made = fleet.router()
    yield made
    made.stop()


def of_router(router: Child) -> Counter[tuple[str, ...]]:
    """Its counters of tokens and blocks: name, then the values of `kind`, `scope` or `tier`, and `tenant`."""
    found = counters(router.ready["http"], "pando_router_")
    return Counter({key: value for key, value in found.items() if "tokens" in key[0] or key[0] == "blocks_copied"})


def of_workers(fleet: Fleet) -> Counter[tuple[str, ...]]:
    """What all workers counted, by the counter's name and, for hits, scope and tier."""
    sums: Counter[tuple[str, ...]] = Counter()
    for worker in fleet.workers:
        for (name, *labels), value in counters(worker.ready["http"], "pando_").items():
            if name == "prefix_cache_hits":
                _, scope, tier, _ = labels
                sums["scope", scope] += value
                sums["tier", tier] += value
            elif name in ("kv_blocks_copied", "generation_tokens"):
                sums[name,] += value
    return sums


def difference(after: Counter[tuple[str, ...]], before: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
    return {key: value - before[key] for key, value in after.items() if value != before[key]}


def counted(tenant: str, usage: pando.Usage) -> Counter[tuple[str, ...]]:
    """What one response adds to a router's counters, after what must hold for every response."""
    computed = usage.prompt_tokens - usage.cached_tokens
    assert 0 < computed <= usage.prompt_tokens
    assert usage.cached_tokens == usage.cached_device + usage.cached_cpu + usage.cached_remote
    assert usage.cached_tokens == usage.cached_own + usage.cached_published
    assert 0 <= usage.queue_ms <= usage.ttft_ms <= usage.total_ms
    sums: Counter[tuple[str, ...]] = Counter()
    sums["tokens", "computed", tenant] = computed
    sums["tokens", "cached", tenant] = usage.cached_tokens
    sums["tokens", "completion", tenant] = usage.completion_tokens
    for tier in ("device", "cpu", "remote"):
        sums["cached_tokens", tenant, tier] = getattr(usage, f"cached_{tier}")
    for scope in ("own", "published"):
        sums["scope_cached_tokens", scope, tenant] = getattr(usage, f"cached_{scope}")
    sums["predicted_cached_tokens", tenant] = usage.predicted_cached_tokens
    sums["blocks_copied", tenant] = usage.blocks_copied
    return sums


def responses(fleet: Fleet, router: Child) -> Iterator[tuple[str, pando.Usage]]:
    """Misses, hits, parts of blocks, a published head, more than the device holds, of two tenants with one text."""
    for number in range(24):
        tenant = "bob" if number % 3 else "alice"
        tail = some_tokens(60 + number % 5, 41 + number)
        tokens = HEAD + tail if number % 2 else tail + some_tokens(70 + number % 4, 100)
        again = [tokens[:-3] + some_tokens(number, 3)] if number % 4 == 0 else []
        with fleet.client(router, tenant) as client:
            for asked in (tokens, *again):
                yield tenant, client.generate(token_ids=asked, max_tokens=3, ignore_eos=True).usage


def test_counters_are_the_sum_of_the_responses_on_routers_and_workers(fleet: Fleet, router: Child) -> None:
    with fleet.client(router, "alice") as alice:
        published = alice.publish_prefix(token_ids=HEAD, scope="public", warm=True)
        before, of_all = of_router(router), of_workers(fleet)
        sums: Counter[tuple[str, ...]] = Counter()
        for tenant, usage in responses(fleet, router):
            sums += counted(tenant, usage)
        assert difference(of_router(router), before) == sums
        seen = difference(of_workers(fleet), of_all)
        alice.delete_prefix(published.id)
    wanted: Counter[tuple[str, ...]] = Counter()
    for key, value in sums.items():
        match key:
            case ("cached_tokens", _, tier):
                wanted["tier", tier] += value
            case ("scope_cached_tokens", scope, _):
                wanted["scope", scope] += value
            case ("blocks_copied", _):
                wanted["kv_blocks_copied",] += value
            case ("tokens", "completion", _):
                wanted["generation_tokens",] += value
    assert seen == wanted
    assert set(wanted) == {
        ("tier", "device"), ("tier", "cpu"), ("scope", "own"), ("scope", "published"), ("kv_blocks_copied",),
        ("generation_tokens",),
    }  # fmt: skip


def test_answers_beside_each_other_count_their_prompt_once(fleet: Fleet, router: Child) -> None:
    sums: Counter[tuple[str, ...]] = Counter()
    before = of_router(router)
    with fleet.client(router, "bob") as bob:
        for n in (1, 3, 2):
            usage = bob.generate(token_ids=some_tokens(80, 75), max_tokens=3, n=n, ignore_eos=True).usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (75, 3 * n)
            sums += counted("bob", usage)
    assert difference(of_router(router), before) == sums


def test_what_a_caller_takes_back_is_counted_as_far_as_it_came(fleet: Fleet, router: Child) -> None:
    before = of_router(router)
    received = 0
    with fleet.client(router, "carol") as carol:
        for number in range(5):
            stream = carol.stream(token_ids=some_tokens(90, 50 + number), max_tokens=500, ignore_eos=True)
            for _ in range(number + 1):
                received += len(next(stream).token_ids)
            stream.close()
        until(lambda: counters(router.ready["http"], "pando_router_").get(("requests_cancelled", "carol")) == 5)
    seen = Counter(difference(of_router(router), before))
    assert seen["tokens", "computed", "carol"] + seen["tokens", "cached", "carol"] == sum(range(50, 55))
    assert seen["tokens", "cached", "carol"] == sum(seen["cached_tokens", "carol", tier] for tier in ("device", "cpu"))
    assert seen["tokens", "cached", "carol"] == seen["scope_cached_tokens", "own", "carol"] > 0
    assert received <= seen["tokens", "completion", "carol"] < 5 * 500
