"""The workload and the checks of the index bench, at a size that takes no time."""

from __future__ import annotations

import pytest

from bench import index
from bench.index_load import CHAIN, DEPTH, make_fleet


@pytest.mark.parametrize(
    ("shape", "depths"), [("whole", [DEPTH]), ("head", [64, 192, DEPTH]), ("spread", list(range(32, DEPTH + 1, 32)))]
)
def test_fleets_have_the_depths_that_their_shape_says(shape: str, depths: list[int]) -> None:
    fleet = make_fleet(shape, 8, 8 * 2 * CHAIN)
    assert fleet.depths() == depths
    assert fleet.num_blocks <= 8 * 2 * CHAIN
    assert fleet == make_fleet(shape, 8, 8 * 2 * CHAIN)


def test_events_are_counted_and_digests_compared() -> None:
    finding = index.events(4 * CHAIN)
    assert [row["blocks"] for row in finding.rows] == [6 * CHAIN, 6 * CHAIN]


def test_match_finds_the_right_depths_in_every_shape() -> None:
    finding = index.match(40_000)
    ours = [row for row in finding.rows if row["index"] == "Pando MemoryIndex"]
    assert [(row["workers"], row["shape"]) for row in ours] == [
        (workers, shape) for workers in (8, 64) for shape in ("whole", "head", "spread")
    ]
