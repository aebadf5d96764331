"""What a KV cache is worth: counts are of the real pool, and the page shows what was measured and nothing else."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.chart import bar_chart
from bench.engine import facts
from bench.engine.checkpoints import SHAPES, ModelShape, write_checkpoint
from bench.engine.facts import Load, concurrency, drawn_load, kv_bytes, paged_mean, reserved_mean, shape_config
from bench.engine.facts_page import plots, text
from bench.traces import Scenario, generate, write_trace
from pando.errors import ConfigError
from pando.settings import WorkerSettings

DOCS = Path(__file__).resolve().parents[3] / "docs"
TINY = ModelShape("LlamaForCausalLM", 32, 2, 2, 1, 16, 64, 512, 256, {"rope_theta": 10_000.0})


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "kv-cache.json").read_text())
    return found


def test_the_page_shows_what_was_measured(document: dict[str, Any]) -> None:
    page = (DOCS / "kv-cache.md").read_text()
    assert not [part for part in text(document) if part not in page]


def test_the_plots_show_what_was_measured(document: dict[str, Any]) -> None:
    drawn = plots(document)
    page = (DOCS / "kv-cache.md").read_text()
    assert {path.name for path in DOCS.glob("kv-cache*.svg")} == set(drawn)
    for name, svg in drawn.items():
        assert (DOCS / name).read_text() == svg
        assert f"]({name})" in page
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_a_cache_is_worth_more_the_longer_the_context(document: dict[str, Any]) -> None:
    times = document["token_times"]
    assert times[-1]["ratio"] > 10 * times[0]["ratio"]
    assert times[-1]["uncached"]["least"] > 10 * times[0]["uncached"]["least"]


def unlike(*lengths: tuple[int, int]) -> Load:
    requests = tuple(
        (array("I", range(100 * n, 100 * n + prompt)), answer) for n, (prompt, answer) in enumerate(lengths)
    )
    return Load("unlike", requests, alike=False)


def test_who_reserves_holds_all_to_its_end() -> None:
    assert reserved_mean([(4, 10)] * 6, positions=8) == 2.0
    assert reserved_mean([(8, 10), (2, 10), (2, 10), (2, 10), (2, 10), (8, 1)], positions=8) == (10 + 4 * 10) / 20
    assert reserved_mean([(1, 5)] * 3, positions=8) == 3.0


def test_paged_sequences_take_the_blocks_they_have_come_to() -> None:
    load = unlike(*[(16, 48)] * 12)
    longest = max(load.lengths)
    paged = paged_mean(load, 2 * longest // 16, reuse=False)
    assert reserved_mean([(longest, 48)] * 12, 2 * longest) == 2.0
    assert 2.0 < paged < 8.0


def test_sequences_that_begin_alike_share_their_blocks() -> None:
    head = list(range(64))
    requests = tuple((array("I", [*head, 1000 + n]), 15) for n in range(24))
    apart, shared = (paged_mean(Load("alike", requests, True), 12, reuse=reuse) for reuse in (False, True))
    assert 2.0 <= apart < 2.5
    assert shared > 3 * apart


def test_a_load_is_asked_of_pools_of_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "ROOMS", (1, 2))
    said: list[str] = []
    found = concurrency(unlike(*[(30, 10)] * 8), say=said.append)
    assert [one.positions for one in found] == [48, 96] and len(said) == 2
    assert [one.reserved for one in found] == [1.0, 2.0]
    assert all(one.shared is None and one.paged >= one.reserved for one in found)


def test_drawn_lengths_are_as_stated() -> None:
    load = drawn_load(100)
    assert min(load.lengths) >= facts.SHORTEST and max(load.lengths) <= facts.LONGEST
    assert load == drawn_load(100)
    assert len({tuple(ids[:4]) for ids, _ in load.requests}) == 100


def test_a_trace_gives_its_lengths(tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    write_trace(generate(Scenario(requests=20, sessions_per_s=1.0, head=512, mean_turn=100, mean_answer=10)), path)
    rows = [json.loads(line) for line in path.read_text().splitlines()][:9]
    load = facts.trace_load(path, 512, 9)
    assert load.name == "made"
    assert load.lengths == [row["input_length"] + row["output_length"] for row in rows]
    assert len({tuple(ids[:512]) for ids, _ in load.requests}) == 1


def test_bytes_are_those_of_the_vectors_and_their_scales() -> None:
    found = {one.dtype: one.bytes_per_token for one in kv_bytes(shape_config(SHAPES["llama-3.1-8b"]))}
    vectors = 32 * 2 * 8
    assert found["bfloat16"] == vectors * 128 * 2 == found["float32"] / 2
    assert found["int8"] == found["fp8"] == vectors * (128 + 2)
    assert found["int4"] == vectors * (64 + 2)


def test_both_times_are_of_one_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "STEPS", 2)
    write_checkpoint(tmp_path / "tiny", TINY, 0)
    settings = WorkerSettings(
        model=str(tmp_path / "tiny"), device="cpu", dtype="float32", threads=1, max_batch_tokens=16
    )
    said: list[str] = []
    found = facts.token_times(settings, (8, 40), rounds=2, say=said.append)
    assert [one.length for one in found] == [8, 40] and len(said) == 2
    for one in found:
        for way in (one.cached, one.uncached):
            assert 0 < way.least <= way.median <= way.most
        assert one.uncached.least / one.cached.most <= one.ratio <= one.uncached.most / one.cached.least


def test_a_file_that_is_no_trace_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no trace"):
        facts.trace_load(tmp_path / "none", 512)


def test_bars_are_as_long_as_their_values() -> None:
    svg = ElementTree.fromstring(bar_chart([("a", 100.0), ("b & c", 25.0)], title="bytes"))
    bars = [float(one.get("width", "")) for one in svg.iter() if one.tag.endswith("rect")][1:]
    assert bars[1] == pytest.approx(bars[0] / 4, abs=0.1)
    assert [one.text for one in svg.iter() if one.tag.endswith("text")] == ["bytes", "a", "100", "b & c", "25"]
