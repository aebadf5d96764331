"""Who shares what: records sealed, the catalog's answers, regions and their owners, pins, purging."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import WorkerId
from kvstore.block_key import block_keys
from kvstore.scope import Region, TenantId, scope_root, tenant_scope
from pando.errors import InvalidRequest, Unavailable
from router.dispatch import Dispatch, SamplingChoice, TokenRequest
from router.fleet import FleetModel
from router.link_messages import Purged
from router.pinning import PIN_S, REPEAT_S, WARM_AGAIN_S, Pinning
from router.prefix_catalog import PrefixCatalog, PrefixRecord, Published, Shared
from router.prefix_seal import PrefixSeal
from router.purging import PurgeReport, Purging
from router.scopes import Scopes
from router.tenants import NO_QUOTA, KvQuota

SECRET = b"secret"
MODEL = FleetModel("m", b"m" * 16, 16, 1000, 8192)
Stage = Any


def record(
    tokens: list[int], publisher: str = "p", audience: str = "public", group: str = "", **rest: Any
) -> PrefixRecord:
    fields = {"id": f"{len(tokens):032x}", "name": "", "model": "m", "copies": 1, "warm": False, "created_ms": 1} | rest
    return PrefixRecord(
        publisher=publisher, audience=audience, group=group, tokens=array("I", tokens).tobytes(), **fields
    )


def catalog_of(*records: PrefixRecord, clock: Callable[[], float] = lambda: 0.0) -> PrefixCatalog:
    catalog = PrefixCatalog(clock)
    for one in records:
        catalog.add(Published(one, 100.0))
    return catalog


def prompt(*tokens: int) -> array[int]:
    return array("I", tokens)


def own(tenant: str) -> bytes:
    return scope_root(SECRET, b"m" * 16, tenant_scope(TenantId(tenant)), block_size=16)


# Sealed records


def test_a_sealed_record_opens_for_its_id_cluster_and_secret_only() -> None:
    seal = PrefixSeal(SECRET, "c")
    one = record([1, 2, 3], name="a name", group="team", audience="group")
    sealed = seal.seal(one)
    assert seal.open(one.id, sealed) == one
    assert seal.seal(one) != sealed
    assert b"name" not in sealed and b"team" not in sealed and one.tokens not in sealed
    assert seal.open("0" * 32, sealed) is None
    assert PrefixSeal(SECRET, "d").open(one.id, sealed) is None
    assert PrefixSeal(b"other", "c").open(one.id, sealed) is None
    for at in range(len(sealed)):
        assert seal.open(one.id, sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]) is None
        assert seal.open(one.id, sealed[:at]) is None


# The catalog


def test_each_tenant_finds_what_it_may_use() -> None:
    catalog = catalog_of(
        record([1] * 20, "a", "own", id="own"),
        record([1] * 30, "a", "group", "g", id="group"),
        record([1] * 10, "a", "public", id="public"),
    )

    def found(tenant: str, *groups: str) -> tuple[str, int] | None:
        shared = catalog.longest(TenantId(tenant), groups, prompt(*[1] * 50).tobytes())
        return (shared.record.id, shared.num_tokens) if shared else None

    assert found("a") == ("own", 20)
    assert found("a", "g") == found("b", "g") == ("group", 30)
    assert found("b") == found("b", "h") == ("public", 10)
    ids = [published.record.id for published in catalog.visible(TenantId("b"), ("g",))]
    assert ids == ["group", "public"]
    assert catalog.get("own", TenantId("b"), ("g",)) is None and catalog.get("own", TenantId("a"), ()) is not None
    for name in ("public", "group", "own", "own"):
        catalog.remove(name)
    assert found("a", "g") is None and len(catalog) == 0


def test_of_equal_heads_the_wider_then_the_older_serves() -> None:
    tokens = [1] * 20
    rows = (
        record(tokens, "late", id="3", created_ms=3),
        record(tokens, "early", id="2", created_ms=2),
        record(tokens, "me", "own", id="1", created_ms=1),
    )
    catalog = catalog_of(*rows)
    assert catalog.longest(TenantId("me"), (), prompt(*tokens).tobytes()) == Shared(rows[1], 20)
    catalog.remove("2")
    assert catalog.longest(TenantId("me"), (), prompt(*tokens).tobytes()) == Shared(rows[0], 20)


def test_what_has_ended_is_forgotten_and_told() -> None:
    now = [0.0]
    one = record([1] * 20)
    catalog = catalog_of(one, clock=lambda: now[0])
    told: list[PrefixRecord] = []
    catalog.on_removed = told.append
    now[0] = 99.0
    catalog.expire()
    assert len(catalog) == 1
    now[0] = 100.0
    catalog.expire()
    assert told == [one] and len(catalog) == 0


# Regions


def test_a_published_head_is_keyed_and_charged_to_its_publisher() -> None:
    scopes = Scopes(SECRET, catalog_of(record([1] * 40, "p")))
    tokens = prompt(*[1] * 40, *[2] * 20)
    a, b = (scopes.cover(MODEL, TenantId(name), (), tokens) for name in ("a", "b"))
    assert a.regions[0] == b.regions[0] and a.regions[0].end == 40
    assert a.owners == (own("p"), own("a")) and a.regions[-1] == Region(own("a"), None)
    assert a.regions[0].root not in (own("p"), own("a"), own("b"))
    keys = [block_keys(cover.regions, tokens, 16) for cover in (a, b)]
    assert keys[0][:2] == keys[1][:2] and not set(keys[0][2:]) & set(keys[1][2:])


@pytest.mark.parametrize("tokens", [[1] * 15 + [2] * 50, [2] * 50, [1] * 15])
def test_less_than_a_block_in_common_is_nothing(tokens: list[int]) -> None:
    scopes = Scopes(SECRET, catalog_of(record([1] * 40)))
    cover = scopes.cover(MODEL, TenantId("a"), (), prompt(*tokens))
    assert cover.regions == (Region(own("a"), None),) and cover.owners == (own("a"),)


def test_an_own_prefix_is_in_the_tenants_scope_alone() -> None:
    rows = record([1] * 40, "a", "own", id="1"), record([1] * 20, "p", id="2")
    scopes = Scopes(SECRET, catalog_of(*rows))
    assert scopes.cover(MODEL, TenantId("a"), (), prompt(*[1] * 50)).regions == (Region(own("a"), None),)
    assert scopes.cover_of(MODEL, rows[0]).regions == (Region(own("a"), None),)
    assert scopes.cover(MODEL, TenantId("b"), (), prompt(*[1] * 50)).regions[0].end == 20


def test_publishers_and_audiences_never_share_a_root() -> None:
    tokens = [1] * 32
    covers = [
        Scopes(SECRET).cover_of(MODEL, record(tokens, publisher, audience, group))
        for publisher in ("a", "b", "public", "by")
        for audience, group in (("public", ""), ("group", "a"), ("group", "b"), ("group", "public"))
    ]
    assert len({cover.regions[0].root for cover in covers}) == len(covers)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_tenant_is_covered_by_what_it_may_not_use(data: st.DataObject) -> None:
    names, groups = st.sampled_from(["a", "b", "c"]), st.sampled_from(["g", "h"])
    runs = st.lists(st.sampled_from([1, 2]), min_size=16, max_size=40)
    rows = [
        record(data.draw(runs), data.draw(names), data.draw(st.sampled_from(["own", "group", "public"])), id=str(i))
        for i in range(data.draw(st.integers(0, 6)))
    ]
    rows = [msgspec.structs.replace(r, group=data.draw(groups)) if r.audience == "group" else r for r in rows]
    tenant, member = data.draw(names), tuple(data.draw(st.sets(groups)))
    tokens = data.draw(runs)
    cover = Scopes(SECRET, catalog_of(*rows)).cover(MODEL, TenantId(tenant), member, prompt(*tokens))
    assert cover.regions[-1] == Region(own(tenant), None)
    if len(cover.regions) == 1:
        return
    head = cover.regions[0]
    assert head.end is not None
    allowed = [
        r
        for r in rows
        if Scopes(SECRET).cover_of(MODEL, r).regions[0].root == head.root
        and (r.audience == "public" or (r.audience == "group" and r.group in member))
        and r.tokens.startswith(prompt(*tokens[: head.end]).tobytes())
    ]
    assert allowed


@pytest.mark.asyncio
async def test_a_submit_says_who_is_charged_and_what_the_tenant_may_have(stage: Stage) -> None:
    stage.add("w")
    one = record([1] * 40, "p")
    scopes = Scopes(SECRET, catalog_of(one))
    for quota in (NO_QUOTA, KvQuota(5, 50, 0, None, 7)):
        deadline = asyncio.get_running_loop().time() + 5
        tokens = prompt(*[1] * 50)
        request = TokenRequest("r", TenantId("a"), tokens, SamplingChoice(max_tokens=1), deadline, quota=quota)
        call = asyncio.ensure_future(anext(Dispatch(stage.fleet, scopes).stream(request)))
        await asyncio.sleep(0.01)
        [submit] = stage.link("w").submits()
        assert [(r.end, r.owner) for r in submit.regions] == [(40, own("p")), (0, b"")]
        assert submit.HasField("quota") == (quota is not NO_QUOTA)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    said = submit.quota
    assert (said.device_floor, said.device_ceiling, said.cpu_floor, said.pinned) == (5, 50, 0, 7)
    assert said.HasField("device_ceiling") and not said.HasField("cpu_ceiling")


# Pins


class House:
    """A fleet of two workers that the test speaks for, a catalog, and the pinning between them."""

    def __init__(self, stage: Stage, one: PrefixRecord) -> None:
        self.stage = stage
        self.record = one
        self.catalog = catalog_of(one, clock=lambda: stage.now - 100.0)
        scopes = Scopes(SECRET, self.catalog)
        self.quotas: dict[str, KvQuota] = {"p": KvQuota(pinned=9)}
        self.pinning = Pinning(stage.fleet, self.catalog, scopes, self.quotas.get, every_s=1000.0)
        self.warmed: list[str] = []
        self.pinning.warm = self.warm
        model = FleetModel("m", b"m" * 16, 16, 1000, 8192)
        self.keys = block_keys(scopes.cover_of(model, one).regions, array("I", one.tokens), 16)

    async def warm(self, one: PrefixRecord, worker: WorkerId, quota: KvQuota, deadline: float) -> None:
        self.warmed.append(worker)
        raise Unavailable("not now")

    def pins(self) -> dict[str, int]:
        """Pins since the last call, by worker."""
        found = {}
        for worker in ("w0", "w1"):
            pins = [message.pin for message in self.stage.link(worker).sent() if message.HasField("pin")]
            assert all(pin.ttl_ms <= 1000 * PIN_S and len(pin.token_ids) == 40 for pin in pins)
            assert all(pin.quota.pinned == 9 and pin.regions[0].owner == own("p") for pin in pins)
            if pins:
                found[worker] = len(pins)
        return found


@pytest.mark.asyncio
async def test_a_prefix_is_pinned_where_it_is_and_again_now_and_then(stage: Stage) -> None:
    stage.add("w0", "w1")
    house = House(stage, record([1] * 40, "p", id="ab" * 16))
    await house.pinning.start()
    house.pinning.look()
    assert house.pins() == {} and house.pinning.num_copies(house.record) == 0
    stage.store("w1", house.keys[:1])
    house.pinning.look()
    assert house.pins() == {"w1": 1} and house.pinning.num_copies(house.record) == 0
    stage.store("w1", house.keys)
    stage.store("w0", house.keys[:1])
    for _ in range(3):
        house.pinning.look()
    assert house.pins() == {"w1": 1} and house.pinning.num_copies(house.record) == 1
    stage.now += REPEAT_S
    house.pinning.look()
    assert house.pins() == {"w1": 1}
    # Another life of the worker begins without pins.
    stage.mirror.say(stage.lease("w1", epoch=2, pid=8))
    stage.link("w1").come_up()
    stage.store("w1", house.keys, epoch=2)
    house.pinning.look()
    assert house.pins() == {"w1": 1}
    # A publisher without a record pins nothing.
    house.quotas.clear()
    stage.now += REPEAT_S
    house.pinning.look()
    assert house.pins() == {} and house.warmed == []
    house.catalog.remove(house.record.id)
    for worker in ("w0", "w1"):
        assert [message.unpin.prefix for message in stage.link(worker).sent()] == [bytes.fromhex(house.record.id)]
    await house.pinning.stop()


@pytest.mark.asyncio
async def test_missing_copies_are_computed_again_but_not_at_once(stage: Stage) -> None:
    stage.add("w0", "w1")
    house = House(stage, record([1] * 40, "p", id="ab" * 16, warm=True))
    for seconds, times in ((0.0, 0), (WARM_AGAIN_S, 1), (0.0, 1), (WARM_AGAIN_S, 2)):
        stage.now += seconds
        house.pinning.look()
        await asyncio.sleep(0)
        assert len(house.warmed) == times
    assert set(house.warmed) == {house.pinning.homes(house.record)[0]}
    other = {"w0": "w1", "w1": "w0"}[house.warmed[0]]
    stage.store(other, house.keys)
    stage.now += WARM_AGAIN_S
    house.pinning.look()
    assert house.pinning.homes(house.record) == [other] and house.pins() == {other: 1} and len(house.warmed) == 2


# Purging


@pytest.mark.asyncio
@pytest.mark.parametrize("silent", [False, True])
async def test_a_purge_reaches_every_scope_of_the_tenant_on_every_worker(silent: bool) -> None:
    rows = record([1] * 40, "a", id="1"), record([2] * 40, "a", "group", "left", id="2"), record([3] * 40, "b", id="3")
    scopes = Scopes(SECRET, catalog_of(*rows))
    asked: list[bytes] = []

    async def delete(tenant: TenantId) -> int:
        return 2

    async def purge(roots: Any, timeout_s: float) -> dict[WorkerId, Purged | None]:
        asked.extend(roots)
        return {WorkerId("w0"): Purged(5, 4, 1), WorkerId("w1"): None if silent else Purged(2, 1, 0)}

    purging = Purging(scopes, lambda: MODEL, lambda tenant: ("team",), delete, purge)
    if silent:
        with pytest.raises(Unavailable, match="w1"):
            await purging.purge(TenantId("a"))
    else:
        assert await purging.purge(TenantId("a")) == PurgeReport(7, 5, 1, 2, 2)
    mine = {scopes.cover_of(MODEL, row).regions[0].root for row in rows[:2]}
    team = scopes.cover_of(MODEL, record([9] * 20, "a", "group", "team")).regions[0].root
    assert set(asked) == {own("a"), team, *mine}
    with pytest.raises(InvalidRequest):
        await purging.purge(TenantId("a b"))
