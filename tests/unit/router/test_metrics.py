"""What the router counts: rows of tenants, bounded, the configured ones first."""

from __future__ import annotations

import pytest

from kvstore.scope import TenantId
from router.metrics import OTHER, Metrics, Spent

SPENT = Spent(
    prompt_tokens=100,
    completion_tokens=7,
    cached_device=30,
    cached_cpu=20,
    cached_remote=10,
    cached_published=40,
    predicted_cached=55,
    blocks_copied=2,
)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"pando_router_{name}_total", labels)


def test_every_split_adds_up() -> None:
    metrics = Metrics()
    for _ in range(2):
        metrics.used(TenantId("a"), SPENT)
    tiers = [value(metrics, "cached_tokens", tenant="a", tier=tier) for tier in ("device", "cpu", "remote")]
    scopes = [value(metrics, "scope_cached_tokens", tenant="a", scope=scope) for scope in ("own", "published")]
    kinds = [value(metrics, "tokens", tenant="a", kind=kind) for kind in ("computed", "cached", "completion")]
    assert (tiers, scopes, kinds) == ([60, 40, 20], [40, 80], [80, 120, 14])
    assert value(metrics, "predicted_cached_tokens", tenant="a") == 110
    assert value(metrics, "blocks_copied", tenant="a") == 4
    assert metrics.total.cached_tokens == metrics.tenants[TenantId("a")].cached_tokens == 120


MOST = 20


@pytest.mark.parametrize("known", [0, 5, MOST + 5])
def test_rows_are_bounded_and_kept_for_the_configured_tenants(known: int) -> None:
    names = [TenantId(f"known-{i}") for i in range(known)]
    metrics = Metrics(names, most_tenants=MOST)
    strangers = [TenantId(f"stranger-{i}") for i in range(MOST + 10)]
    for tenant in [*strangers, *names, *strangers]:
        metrics.begin(tenant)
        metrics.used(tenant, SPENT)
    assert len(metrics.tenants) <= MOST + 1
    own = min(known, MOST)
    assert all(metrics.tenants[name].requests == 1 for name in names[:own])
    first = MOST - own
    assert all(metrics.tenants[name].requests == 2 for name in strangers[:first])
    others = 2 * len(strangers[first:]) + len(names[own:])
    assert metrics.tenants[OTHER].requests == others
    assert value(metrics, "requests", tenant="other") == others


@pytest.mark.asyncio
@pytest.mark.parametrize("most", [0, 1, 32])
async def test_a_thousand_tenants_are_a_bounded_number_of_labels_and_no_token_is_lost(most: int) -> None:
    metrics = Metrics([TenantId("known")], most_tenants=most)
    for number in range(1000):
        tenant = TenantId(f"tenant-{number}")
        metrics.begin(tenant)
        metrics.used(tenant, SPENT)
        for ended in (metrics.fail, metrics.refuse, metrics.cancel):
            ended(tenant)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    labels = {sample.labels["tenant"] for sample in samples if "tenant" in sample.labels}
    assert OTHER in labels and len(labels) <= most + 1 and len(metrics.tenants) <= most + 1
    for name, wanted in (("tokens", 107), ("cached_tokens", 60), ("scope_cached_tokens", 60), ("requests", 1)):
        found = [sample.value for sample in samples if sample.name == f"pando_router_{name}_total"]
        assert sum(found) == 1000 * wanted
        assert len(found) <= (most + 1) * 3
