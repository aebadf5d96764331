"""Linked lists over block ids against plain lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.block_lists import BlockLists

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["back", "front", "remove", "drop"]), st.integers(0, 1), st.integers(0, 7)), max_size=60
)


@given(OPERATIONS)
def test_behaves_like_lists(operations: list[tuple[str, int, int]]) -> None:
    lists = BlockLists(8)
    heads = [lists.add_list(), lists.add_list()]
    models: list[list[int]] = [[], []]
    for name, which, block in operations:
        inside = any(block in model for model in models)
        if name == "drop":
            lists.drop_list(heads[which])
            heads[which] = lists.add_list()
            models[which].clear()
        elif name == "remove" and inside:
            lists.remove(block)
            next(model for model in models if block in model).remove(block)
        elif name == "back" and not inside:
            lists.push_back(heads[which], block)
            models[which].append(block)
        elif name == "front" and not inside:
            lists.push_front(heads[which], block)
            models[which].insert(0, block)
        for head, model in zip(heads, models, strict=True):
            assert list(lists.iterate(head)) == model
            assert lists.first(head) == (model[0] if model else None)
        assert [block in lists for block in range(8)] == [any(b in m for m in models) for b in range(8)]
