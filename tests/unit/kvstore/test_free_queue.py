"""The free queue against a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.free_queue import FreeQueue

OPERATIONS = st.lists(st.tuples(st.sampled_from(["back", "front", "remove", "pop"]), st.integers(0, 7)), max_size=60)


@given(OPERATIONS)
def test_behaves_like_a_list(operations: list[tuple[str, int]]) -> None:
    queue, model = FreeQueue(8), list(range(8))
    for name, number in operations:
        if name == "pop":
            count = min(number, len(model))
            assert queue.pop_front(count) == model[:count]
            del model[:count]
        elif name == "remove" and number in model:
            queue.remove(number)
            model.remove(number)
        elif name == "back" and number not in model:
            queue.push_back(number)
            model.append(number)
        elif name == "front" and number not in model:
            queue.push_front(number)
            model.insert(0, number)
        assert list(queue) == model
