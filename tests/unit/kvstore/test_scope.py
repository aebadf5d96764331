"""Scope roots: the same for the same scope, different for anything else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.scope import (
    PUBLIC_SCOPE,
    Region,
    ScopeRoot,
    TenantId,
    check_regions,
    frame,
    group_scope,
    scope_root,
    tenant_scope,
)

FIELDS = st.lists(st.text() | st.binary(), max_size=4)


def as_bytes(field: str | bytes) -> bytes:
    return field.encode() if isinstance(field, str) else field


@given(FIELDS, FIELDS)
def test_framing_is_injective(left: list[str | bytes], right: list[str | bytes]) -> None:
    same = [as_bytes(field) for field in left] == [as_bytes(field) for field in right]
    assert (frame("d", *left) == frame("d", *right)) == same


def test_every_input_counts() -> None:
    roots = {
        scope_root(secret, model, scope, block_size=size, adapter=adapter)
        for secret, model, scope, size, adapter in itertools.product(
            (b"s1", b"s2"), (b"m1", b"m2"), ("tenant:a", "group:a", "public"), (8, 16), ("", "a", "tenant:a")
        )
    }
    assert len(roots) == 2 * 2 * 3 * 2 * 3
    assert all(len(root) == 16 for root in roots)


def test_an_adapter_named_like_a_scope_is_not_that_scope() -> None:
    assert scope_root(b"s", b"m", "b", block_size=16, adapter="a") != scope_root(
        b"s", b"m", "a", block_size=16, adapter="b"
    )
    assert scope_root(b"s", b"m", "ab", block_size=16) != scope_root(b"s", b"m", "b", block_size=16, adapter="a")


def test_same_inputs_same_root_in_every_process() -> None:
    root = scope_root(b"secret", b"fingerprint", "tenant:a", block_size=16)
    assert root.hex() == "3ed59860a3c4944fe8da23fb5e39cbd5"


def test_long_secrets_count_to_their_last_byte() -> None:
    assert scope_root(b"x" * 100, b"m", "s", block_size=16) != scope_root(b"x" * 99 + b"y", b"m", "s", block_size=16)


def test_no_root_without_a_secret() -> None:
    with pytest.raises(ValueError, match="secret"):
        scope_root(b"", b"m", "s", block_size=16)


def test_scope_ids_do_not_meet() -> None:
    assert len({tenant_scope(TenantId("public")), group_scope("public"), PUBLIC_SCOPE}) == 3


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [Region(ScopeRoot(bytes(16)), 5)],
        [Region(ScopeRoot(bytes(16)), None), Region(ScopeRoot(bytes(16)), None)],
        [Region(ScopeRoot(bytes(16)), 5), Region(ScopeRoot(bytes(16)), 4), Region(ScopeRoot(bytes(16)), None)],
        [Region(ScopeRoot(bytes(16)), -1), Region(ScopeRoot(bytes(16)), None)],
        [Region(ScopeRoot(b"short"), None)],
    ],
)
def test_bad_regions(regions: list[Region]) -> None:
    with pytest.raises(ValueError, match=r"region|root"):
        check_regions(regions)
