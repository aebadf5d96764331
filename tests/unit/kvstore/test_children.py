"""The index of children: the closest one is found exactly, among any number."""

from __future__ import annotations

import random

from kvstore.children import Children, common_bytes


def test_the_closest_child_is_the_best_of_all() -> None:
    rng = random.Random(5)
    labels = {block: bytes(rng.choices(range(3), k=8)) for block in range(3000)}
    unique = {label: block for block, label in labels.items()}
    children = Children(labels.__getitem__)
    present: set[int] = set()
    for turn, block in enumerate(unique.values()):
        children.add(7, block)
        present.add(block)
        if turn % 3 == 0:
            gone = rng.choice(sorted(present))
            children.remove(7, gone)
            present.remove(gone)
        if turn % 20 == 0 and present:
            wanted = bytes(rng.choices(range(3), k=rng.randrange(1, 9)))
            best = max(common_bytes(labels[block], wanted) for block in present)
            found = children.closest(7, wanted)
            assert found is not None and found[1] == best == common_bytes(labels[found[0]], wanted)
            assert set(children.of(7)) == present
    assert len(present) > 600
    for block in present:
        assert 7 in children
        children.remove(7, block)
    assert 7 not in children and children.of(7) == [] and children.closest(7, b"x") is None


def test_common_bytes() -> None:
    assert common_bytes(b"", b"abc") == 0
    assert common_bytes(b"abc", b"abd") == 2
    assert common_bytes(b"ab", b"abc") == 2
    assert common_bytes(b"\x00\x00", b"\x00\x00") == 2
    assert common_bytes(b"\x01", b"\x00") == 0
