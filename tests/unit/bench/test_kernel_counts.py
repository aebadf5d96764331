"""KV bytes of a planned step: shared prefixes come from memory about once, and the count says so where they do not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bench.kernels import counts
from bench.kernels.counts import CLAIMED, MOST, Counts, Launch, Read, cpu_counts, gpu_counts, main, missed, reads, table
from bench.kernels.shapes import SHAPES, Shape, block_tables
from kernels.configs import Tuning

BY_NAME = {shape.name: shape for shape in SHAPES}
PAGE = re.sub(" +", " ", (Path(__file__).resolve().parents[3] / "docs" / "kv-cache.md").read_text())
SMALL = Shape("small", (1,) * 6, (160,) * 6, 1.0, shared=128, groups=2, heads=(4, 2, 16))


def row(found: Counts) -> str:
    return re.sub(" +", " ", table([found]).splitlines()[2])


@pytest.mark.parametrize("name", CLAIMED)
def test_shared_prefixes_come_from_memory_about_once(name: str) -> None:
    found = gpu_counts(BY_NAME[name])
    assert found.claims()["memory"]
    assert found.unique <= found.planned.memory <= MOST * found.unique
    assert found.planned.memory <= found.planned.pieces < found.alone.pieces / 5
    assert found.planned.memory <= found.alone.memory
    assert found.nodes
    assert row(found) in PAGE


def test_what_is_read_for_each_tile_of_rows_is_counted_for_each() -> None:
    found = gpu_counts(BY_NAME["C1"])  # 64 sequences of 4 rows a key head, in tiles of 64 rows
    assert found.planned.pieces == (4 * 2048 + 64 * 256) * 8 * 2 * 128 * 2
    assert found.alone.pieces == 64 * (2048 + 256) * 8 * 2 * 128 * 2
    assert found.unique == (2048 + 64 * 256) * 8 * 2 * 128 * 2


@pytest.mark.parametrize("share", [True, False])
def test_every_byte_is_read_once_at_least(share: bool) -> None:
    found = gpu_counts(SMALL, Tuning(share=share))
    assert found.unique == (2 * 128 + 6 * 32) * 2 * 2 * 16 * 2 == found.planned.memory
    assert found.planned.pieces == (found.unique if share else found.alone.pieces)
    assert bool(found.nodes) == share


def test_without_room_in_the_cache_each_piece_reads_from_memory() -> None:
    tables = block_tables(SMALL)
    pieces = [(0, (0, 0, 128)), (0, (2, 0, 128))]  # of one group
    one_by_one = [Launch(pieces, room=1, turn_us=1.0)]
    assert missed(reads(one_by_one, tables, 2), room=8) == 8
    assert missed(reads(one_by_one, tables, 2), room=7) == 16
    together = [Launch(pieces, room=2, turn_us=1.0)]
    assert sorted(reads(together, tables, 2)) == sorted(np.tile(tables[0, :8] * 2, 2).tolist())


def test_a_program_begins_where_another_ends() -> None:
    launch = Launch([(0, (row, 0, 64)) for row in range(3)], room=1, turn_us=1.0)
    assert list(reads([launch], np.arange(12).reshape(3, 4), 1)) == list(range(12))


def test_the_least_recently_used_goes_first() -> None:
    assert missed(iter([1, 2, 1, 3, 1, 2]), room=2) == 4


def test_the_cpu_reads_what_is_shared_once() -> None:
    found = cpu_counts(SMALL)
    assert found.alone.pieces == 6 * 160 * 2 * 2 * 16 * 4
    assert found.unique <= found.planned.pieces < found.alone.pieces
    assert not found.claims()
    for name in ("C1", "C2"):
        counted = cpu_counts(BY_NAME[name])
        assert counted.claims() == {"pieces": True}
        assert row(counted) in PAGE


def test_a_miss_is_said_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def made(shape: Shape) -> Counts:
        memory = {"C1": 110, "C2": 111}[shape.name]
        return Counts(shape.name, "gpu", 100, Read(200, memory), Read(800, 800), 10, nodes=1)

    monkeypatch.setattr(counts, "gpu_counts", made)
    assert main(["--shapes", "C1"]) == 0
    assert "memory met" in capsys.readouterr().out
    assert main(["--shapes", "C1,C2", "--json", str(tmp_path / "counts.json")]) == 1
    assert "memory MISSED" in capsys.readouterr().out
    assert [one["planned"]["memory"] for one in json.loads((tmp_path / "counts.json").read_text())] == [110, 111]


def test_what_is_not_shared_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shapes", "C6"]) == 0
    assert "nothing shared" in capsys.readouterr().out
