"""Block keys: one chain for a prefix, cut at region borders, equal however it is walked."""

from __future__ import annotations

from array import array

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block_key import KeyChain, block_keys, key_fingerprint, token_bytes
from kvstore.scope import Region, ScopeRoot, scope_root

PUBLIC = scope_root(b"s", b"m", "public", block_size=4)
GROUP = scope_root(b"s", b"m", "group:g", block_size=4)
A = scope_root(b"s", b"m", "tenant:a", block_size=4)
B = scope_root(b"s", b"m", "tenant:b", block_size=4)


def digest(parent: bytes, data: bytes, root: bytes) -> bytes:
    return xxhash.xxh3_128(parent + data, seed=int.from_bytes(root[:8], "little")).digest()


def tokens(*ids: int) -> array[int]:
    return array("I", ids)


@st.composite
def region_lists(draw: st.DrawFn) -> list[Region]:
    ends = sorted(draw(st.lists(st.integers(0, 40), max_size=3)))
    roots = draw(st.lists(st.sampled_from([PUBLIC, GROUP, A, B]), min_size=len(ends) + 1, max_size=len(ends) + 1))
    return [Region(root, end) for root, end in zip(roots, [*ends, None], strict=True)]


@given(
    region_lists(),
    st.lists(st.integers(0, 2**32 - 1), max_size=60),
    st.integers(1, 9),
    st.sampled_from([128, 8, 1]),
)
def test_a_walked_chain_gives_the_same_keys(regions: list[Region], ids: list[int], size: int, bits: int) -> None:
    prompt = array("I", ids)
    keys = block_keys(regions, prompt, size, key_bits=bits)
    assert len(keys) == len(ids) // size
    chain = KeyChain(regions, size, key_bits=bits)
    for _ in range(2):
        for index, key in enumerate(keys):
            data = token_bytes(prompt[index * size : (index + 1) * size])
            assert chain.index == index and chain.peek(data) == key
            chain.advance(key)
        chain.restart()


@given(region_lists(), st.lists(st.integers(0, 3), max_size=60), st.integers(0, 60))
def test_a_prefix_has_the_prefix_of_the_keys(regions: list[Region], ids: list[int], cut: int) -> None:
    keys = block_keys(regions, array("I", ids), 4)
    assert block_keys(regions, array("I", ids[:cut]), 4) == keys[: min(cut, len(ids)) // 4]


def test_the_chain_as_written_down() -> None:
    prompt = tokens(*range(10))
    first = digest(A, prompt[:4].tobytes(), A)
    assert block_keys([Region(A, None)], prompt, 4) == [first, digest(first, prompt[4:8].tobytes(), A)]


def test_scope_switch_as_written_down() -> None:
    """The border at position 6 rounds down to a block; the tail's first parent binds head and tenant."""
    prompt = tokens(*range(8))
    head = digest(PUBLIC, prompt[:4].tobytes(), PUBLIC)
    tail = digest(digest(head, A, A), prompt[4:].tobytes(), A)
    assert block_keys([Region(PUBLIC, 6), Region(A, None)], prompt, 4) == [head, tail]


def test_tenants_share_the_head_and_no_tail() -> None:
    prompt = tokens(*range(32))
    of_a = block_keys([Region(PUBLIC, 16), Region(A, None)], prompt, 4)
    of_b = block_keys([Region(PUBLIC, 16), Region(B, None)], prompt, 4)
    assert of_a[:4] == of_b[:4]
    assert not set(of_a[4:]) & set(of_b)


def test_a_region_without_a_full_block_leaves_no_trace() -> None:
    prompt = tokens(*range(16))
    assert block_keys([Region(PUBLIC, 3), Region(A, None)], prompt, 4) == block_keys([Region(A, None)], prompt, 4)
    three = [Region(PUBLIC, 8), Region(GROUP, 11), Region(A, None)]
    assert block_keys(three, prompt, 4) == block_keys([Region(PUBLIC, 8), Region(A, None)], prompt, 4)


def test_the_same_tokens_elsewhere_have_another_key() -> None:
    keys = block_keys([Region(A, None)], tokens(*[7] * 40), 4)
    assert len(set(keys)) == 10


def test_keys_do_not_drift_between_versions() -> None:
    """Routers and workers of two releases share an index: a change here needs a new key version."""
    keys = block_keys([Region(ScopeRoot(bytes(range(16))), None)], tokens(1, 2, 3, 4, 5, 6, 7, 2**32 - 1), 4)
    assert [key.hex() for key in keys] == ["641b73bf94e9ebc9f107322d7ccef40e", "aaeed9eab9d202629d4064a059bc7399"]
    assert key_fingerprint(b"model", 16) == "3e064c7f2ca3ae8aa4746db4865511af"


def test_fingerprints() -> None:
    prints = {key_fingerprint(model, size) for model in (b"a", b"b") for size in (8, 16)}
    assert len(prints) == 4 and key_fingerprint(b"a", 8) in prints


def test_cut_keys_keep_their_length_and_few_values() -> None:
    keys = block_keys([Region(A, None)], tokens(*range(4000)), 4, key_bits=3)
    assert {len(key) for key in keys} == {16} and len(set(keys)) == 8


@pytest.mark.parametrize("bits", [0, 129])
def test_impossible_key_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="key_bits"):
        block_keys([Region(A, None)], tokens(1), 4, key_bits=bits)


def test_only_u32_arrays_are_keyed() -> None:
    with pytest.raises(ValueError, match="array"):
        block_keys([Region(A, None)], array("q", [1, 2, 3, 4]), 4)
