"""Identity: keys of a file that reloads, named tenants on loopback alone, and the admin key."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kvstore.scope import TenantId
from pando.errors import ConfigError, InvalidRequest, ResourceExhausted, Unauthenticated
from router.admission import Admission
from router.auth import (
    KeyedTenants,
    NamedTenants,
    check_admin_key,
    is_loopback,
    key_hash,
    make_key,
    open_authenticator,
    require_admin,
)
from router.tenants import KvQuota, Tenant


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


def write(path: Path, text: str) -> Path:
    """A change that any file system shows: another size or a later time."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    text = f'[tenants.acme]\nkeys = ["{key_hash("k1")}", "{key_hash("k2")}"]\nmax_in_flight = 3\n'
    return write(tmp_path / "tenants.toml", text + f'[tenants.other]\nkeys = ["{key_hash("k3")}"]\n')


def test_a_key_names_its_tenant(keys: Path) -> None:
    tenants = KeyedTenants(keys)
    assert tenants.tenant(bearer("k1")) == tenants.tenant(bearer("k2")) == Tenant("acme", 3)
    assert tenants.tenant([("Authorization".lower(), "bearer k3")]).id == "other"


def test_the_named_tenant_is_ignored_where_there_are_keys(keys: Path) -> None:
    assert KeyedTenants(keys).tenant([*bearer("k1"), ("x-pando-tenant", "other")]).id == "acme"


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("x-pando-tenant", "acme")],
        bearer("wrong"),
        bearer(""),
        bearer(key_hash("k1")),
        bearer("k1 "),
        bearer("k" * 10_000),
        [("authorization", "Basic k1")],
        [("authorization", "k1")],
        [("authorization", b"Bearer k1")],
        [*bearer("k1"), *bearer("k3")],
    ],
)
def test_anything_but_one_good_key_is_refused(keys: Path, metadata: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated):
        KeyedTenants(keys).tenant(metadata)


def test_a_change_of_the_file_is_seen_within_a_second(keys: Path) -> None:
    clock = Clock()
    tenants = KeyedTenants(keys, clock=clock)
    write(keys, f'[tenants.acme]\nkeys = ["{key_hash("new")}"]\n')
    clock.now = 1.0
    assert tenants.tenant(bearer("new")).id == "acme"
    with pytest.raises(Unauthenticated):
        tenants.tenant(bearer("k1"))


def test_a_broken_change_keeps_the_keys_before_it(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tenants = KeyedTenants(keys, clock=clock)
    write(keys, "no = toml = at all")
    clock.now = 1.0
    assert tenants.tenant(bearer("k1")).id == "acme"
    assert "not reloaded" in caplog.text
    keys.unlink()
    clock.now = 2.0
    assert tenants.tenant(bearer("k1")).id == "acme"
    write(keys, f'[tenants.late]\nkeys = ["{key_hash("k9")}"]\n')
    clock.now = 3.0
    assert tenants.tenant(bearer("k9")).id == "late"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold"),
        ("[tenants]", "must hold"),
        ("tenants = 3", "must hold"),
        ("[tenants.a]\nkeys = []\n[more]", "must hold"),
        ("[tenants.a]", "no list of keys"),
        ("[tenants.a]\nkeys = []", "no list of keys"),
        ('[tenants.a]\nkeys = ["plain"]', "64 hex digits"),
        ("[tenants.a]\nkeys = [3]", "64 hex digits"),
        (f'[tenants.a]\nkeys = ["{key_hash("k")}"]\n[tenants.b]\nkeys = ["{key_hash("k")}"]', "same key"),
        (f'[tenants.a]\nkeys = ["{key_hash("k")}"]\nquota = 3', "settings other than"),
        (f'[tenants.a]\nkeys = ["{key_hash("k")}"]\nmax_in_flight = -1', "max_in_flight"),
        (f'[tenants.a]\nkeys = ["{key_hash("k")}"]\nmax_in_flight = true', "max_in_flight"),
        *(
            (f'[tenants.a]\nkeys = ["{key_hash("k")}"]\n{line}', says)
            for line, says in (
                ('groups = "g"', "list of names"),
                ("groups = [3]", "list of names"),
                ('groups = ["a b"]', "group 'a b'"),
                (f"groups = {[f'g{i}' for i in range(17)]}", "more than 16 groups"),
                ('publish = ["all"]', "publish"),
                ("publish = true", "list of names"),
                ("device_floor_blocks = -1", "device_floor_blocks"),
                ("device_floor_blocks = 1.5", "device_floor_blocks"),
                ("cpu_ceiling_blocks = 2147483648", "cpu_ceiling_blocks"),
                ("device_floor_blocks = 3\ndevice_ceiling_blocks = 2", "below its device_floor"),
                ("cpu_floor_blocks = 3\ncpu_ceiling_blocks = 2", "below its cpu_floor"),
                ("publish_budget_blocks = true", "publish_budget_blocks"),
            )
        ),
        (f'[tenants."a b"]\nkeys = ["{key_hash("k")}"]', "tenant name"),
        (f'[tenants.{"a" * 65}]\nkeys = ["{key_hash("k")}"]', "tenant name"),
        ("\x00", "TOML"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        KeyedTenants(write(tmp_path / "t.toml", text))


def test_a_file_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        KeyedTenants(tmp_path / "none.toml")


def test_made_keys_are_long_random_and_known_by_their_hash(tmp_path: Path) -> None:
    key, line = make_key()
    assert len(key) > 40 and key not in line and make_key()[0] != key
    tenants = KeyedTenants(write(tmp_path / "t.toml", f'[tenants.a]\nkeys = ["{line}"]\n'))
    assert tenants.tenant(bearer(key)).id == "a"


def test_without_keys_the_header_names_the_tenant() -> None:
    named = NamedTenants()
    assert named.tenant([]).id == "default"
    assert named.tenant([("x-pando-tenant", "team-1.a_B")]).id == "team-1.a_B"


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a/b", "\u00e9", "-a", "a\n", "a:b", b"a"])
def test_bad_tenant_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        NamedTenants().tenant([("x-pando-tenant", name)])


def test_two_tenant_names_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        NamedTenants().tenant([("x-pando-tenant", "a"), ("x-pando-tenant", "b")])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    assert isinstance(open_authenticator("", host), NamedTenants)
    check_admin_key("", host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "", "127.0.0.1.example.com"])
def test_any_other_address_needs_keys(host: str, keys: Path) -> None:
    with pytest.raises(ConfigError, match="--tenants"):
        open_authenticator("", host)
    assert isinstance(open_authenticator(str(keys), host), KeyedTenants)
    with pytest.raises(ConfigError, match="admin key"):
        check_admin_key("", host)
    check_admin_key("k", host)


def test_the_admin_key() -> None:
    require_admin("", [])
    require_admin("k", bearer("k"))
    for metadata in ([], bearer("x"), bearer("")):
        with pytest.raises(Unauthenticated):
            require_admin("k", metadata)


async def entered(stack: AsyncExitStack, admission: Admission, tenant: Tenant, request_id: str = "") -> str:
    return await stack.enter_async_context(admission.enter(tenant, request_id))


@pytest.mark.asyncio
async def test_places_are_given_back_whatever_happens() -> None:
    admission = Admission(2)
    with pytest.raises(RuntimeError, match="bug"):
        async with AsyncExitStack() as stack:
            assert await entered(stack, admission, Tenant("a"), "one") == "one"
            assert (admission.in_flight, admission.in_flight_of("a")) == (1, 1)
            await entered(stack, admission, Tenant("b"), "one")
            with pytest.raises(ResourceExhausted) as full:
                await entered(stack, admission, Tenant("c"))
            raise RuntimeError("bug")
    assert full.value.retry_after_s
    assert (admission.in_flight, admission.in_flight_of("a"), admission.in_flight_of("b")) == (0, 0, 0)


@pytest.mark.asyncio
async def test_a_flood_leaves_some_of_the_routers_places_to_others() -> None:
    admission = Admission(16)
    async with AsyncExitStack() as stack:
        for tenant, most in (("flood", 14), ("b", 2)):
            for _ in range(most):
                await entered(stack, admission, Tenant(TenantId(tenant)))
            with pytest.raises(ResourceExhausted) as full:
                await entered(stack, admission, Tenant(TenantId(tenant)))
            assert full.value.reason == "ROUTER_BUSY" and full.value.retry_after_s
        assert admission.in_flight == 16


@pytest.mark.asyncio
async def test_a_tenants_own_limit() -> None:
    admission = Admission(10)
    limited = Tenant("a", 1)
    async with AsyncExitStack() as stack:
        await entered(stack, admission, limited)
        with pytest.raises(ResourceExhausted) as full:
            await entered(stack, admission, limited)
        assert full.value.violations[0].field == "tenant:a"
        await entered(stack, admission, Tenant("b", 1))
    async with AsyncExitStack() as stack:
        await entered(stack, admission, limited)


def test_what_a_tenant_may_use_and_share(tmp_path: Path) -> None:
    rest = """groups = ["g", "h", "g"]
publish = ["own", "public"]
device_floor_blocks = 10
device_ceiling_blocks = 100
cpu_ceiling_blocks = 0
publish_budget_blocks = 0
weight = 4
requests_per_s = 2.5
prompt_tokens_per_s = 1000
ttft_target_ms = 1500
"""
    path = write(
        tmp_path / "t.toml", f'[tenants.b]\nkeys = ["{key_hash("b")}"]\n[tenants.a]\nkeys = ["{key_hash("a")}"]\n'
    )
    clock = Clock()
    tenants = KeyedTenants(path, clock=clock)
    plain = tenants.tenant(bearer("a"))
    assert (plain.groups, plain.publish, plain.quota) == ((), {"own", "group"}, KvQuota())
    assert tenants.known() == ("b", "a") and tenants.lookup(plain.id) == plain
    path.write_text(path.read_text() + rest)
    write(path, path.read_text())
    clock.now = 1.0
    changed = tenants.tenant(bearer("a"))
    assert (changed.groups, changed.publish) == (("g", "h"), {"own", "public"})
    assert changed.quota == KvQuota(10, 100, 0, 0, 0)
    assert (changed.weight, changed.requests_per_s, changed.prompt_tokens_per_s) == (4, 2.5, 1000.0)
    assert (plain.weight, plain.requests_per_s, plain.prompt_tokens_per_s) == (1, 0.0, 0.0)
    assert (plain.ttft_s, changed.ttft_s) == (0, 1.5)
    assert tenants.lookup(changed.id) == changed and tenants.lookup(TenantId("nobody")) is None


def test_without_keys_everything_may_be_published_and_nobody_is_in_a_group() -> None:
    tenant = NamedTenants().tenant([("x-pando-tenant", "a")])
    assert (tenant.publish, tenant.groups) == ({"own", "group", "public"}, ())
    assert NamedTenants().lookup(tenant.id) == tenant and NamedTenants().known() == ()
