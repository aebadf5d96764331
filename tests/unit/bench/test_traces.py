"""Made-up traces: what they share is what their scenario says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench.traces import Scenario, generate, main, read_scenario, scenarios
from pando.errors import ConfigError

PLAIN = Scenario(requests=60, sessions_per_s=2.0, block_size=16, mean_turn=40, mean_answer=20)


@pytest.mark.parametrize("path", scenarios(), ids=lambda path: path.stem)
def test_every_scenario_makes_a_trace(path: Path) -> None:
    scenario = replace(read_scenario(path.stem), requests=50)
    rows = list(generate(scenario))
    assert len(rows) == 50
    assert rows == sorted(rows, key=lambda row: row["timestamp"])
    for row in rows:
        assert len(row["hash_ids"]) == -(-row["input_length"] // scenario.block_size)
        assert row["output_length"] >= 1
    assert rows == list(generate(scenario))


def test_all_share_the_head_and_nothing_else() -> None:
    rows = list(generate(replace(PLAIN, head=33)))
    counts = Counter(hash_id for row in rows for hash_id in row["hash_ids"])
    assert sorted(counts.values(), reverse=True)[:3] == [60, 60, 1]


def test_a_turn_repeats_all_before_it_but_the_open_block() -> None:
    rows = list(generate(replace(PLAIN, requests=3, sessions_per_s=1e-9, turns=3)))
    first, second, third = rows
    for before, after in ((first, second), (second, third)):
        full = before["input_length"] // 16
        assert after["hash_ids"][:full] == before["hash_ids"][:full]
        assert after["input_length"] > before["input_length"] + before["output_length"]


def test_requests_of_a_fan_come_at_once_and_differ_at_their_end() -> None:
    rows = list(generate(replace(PLAIN, requests=8, sessions_per_s=1e-9, turns=2, fan=4, head=64)))
    assert len({row["timestamp"] for row in rows}) == 2
    assert len({tuple(row["hash_ids"]) for row in rows}) == 8
    assert len({tuple(row["hash_ids"][:4]) for row in rows}) == 1


def test_some_tenants_are_busier_than_others() -> None:
    rows = list(generate(replace(PLAIN, requests=400, tenants=20, tenant_head=16, zipf=1.2)))
    of_tenants = Counter(row["hash_ids"][0] for row in rows)
    [(_, most)] = of_tenants.most_common(1)
    assert most > 3 * 400 / 20


def test_the_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("requests = 5\nsessions_per_s = 1.0\n")
    assert main([str(tmp_path / "mine.toml"), "--out", str(tmp_path / "mine.jsonl")]) == 0
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == 5
    assert main(["nothing", "--out", str(tmp_path / "none")]) == 2
    assert "multi_turn" in capsys.readouterr().err


def test_an_option_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("requests = 5\nsession = 1\n")
    with pytest.raises(ConfigError):
        read_scenario(str(tmp_path / "bad.toml"))
