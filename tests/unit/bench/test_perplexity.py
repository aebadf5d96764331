"""The perplexity bench: each token once, bounded blocks, equal figures where attention is equal; its table and plot."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bench import kv_formats, perplexity
from bench.chart import Line, line_chart
from bench.perplexity import Attention, Measured, measure
from pando.errors import ConfigError
from tests.oracle import make_checkpoint, oracle_logits
from tests.runner_driver import random_tokens
from worker.models.config import read_config

TEXT = array("I", random_tokens(700, seed=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("perplexity") / "small-model"
    make_checkpoint(made, "qwen3")
    return made


def test_full_attention_is_the_oracles_loss(folder: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "qwen3")
    text = TEXT[:400]
    measured = measure(str(folder), Attention("full"), text)
    losses = torch.nn.functional.cross_entropy(
        oracle_logits(model, text)[:-1], torch.tensor(text[1:], dtype=torch.int64), reduction="none"
    )
    torch.testing.assert_close(measured.losses, losses.double(), atol=1e-3, rtol=0)
    assert measured.most_blocks == 25


def test_a_window_holds_its_blocks_and_no_more(folder: Path) -> None:
    full = measure(str(folder), Attention("full"), TEXT)
    near = measure(str(folder), Attention("near", 64), TEXT)
    sinks = measure(str(folder), Attention("sinks", 56, 8), TEXT)
    assert full.most_blocks == 44
    for limited in (near, sinks):
        assert len(limited.losses) == 699
        assert limited.most_blocks <= (64 + perplexity.CHUNK) // perplexity.BLOCK_SIZE + 2
        assert torch.equal(limited.losses[:40].round(decimals=3), full.losses[:40].round(decimals=3))
        assert not torch.allclose(limited.losses[300:], full.losses[300:], atol=0.1)
    assert not torch.allclose(near.losses[300:], sinks.losses[300:], atol=0.1)


def measured(losses: list[float], name: str = "full") -> Measured:
    return Measured(Attention(name), torch.tensor(losses, dtype=torch.float64), 5, 2.0)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    one = measured([math.log(2), math.log(8), math.log(5)])
    assert one.perplexity(0, 2) == pytest.approx(4)
    assert one.perplexity(2) == pytest.approx(5)


def test_buckets_cover_each_position_once() -> None:
    assert perplexity.buckets(5000) == [(0, 1024), (1024, 2048), (2048, 4096), (4096, 5000)]
    assert perplexity.buckets(1024) == [(0, 1024)]


def test_table_and_summary_tell_what_is_beyond_training() -> None:
    runs = [measured([1.0] * 3000), measured([2.0] * 3000, "window 5")]
    table = perplexity.table(runs, 2048)
    assert "2,048 to 3,000 *" in table
    assert "1,024 to 2,048 |" in table
    assert "at most 2,048 positions" in table
    assert "| window 5 | 7.39 | 7.39 | 7.39 | 7.39 | 5 | 1,500 |" in table
    assert "trained on" not in perplexity.table(runs, 4096)
    summary = json.loads(json.dumps(perplexity.summary(runs, 2048)))
    assert summary["attention"][1]["by_position"]["0-1024"] == pytest.approx(math.e**2)


def test_plot_is_svg_with_a_line_each() -> None:
    drawn = ElementTree.fromstring(
        perplexity.plot([measured([1.0, 2.0] * 1000), measured([3.0] * 2000, "a < b")], 1000)
    )
    lines = [part for part in drawn if part.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [4, 4]
    texts = [part.text for part in drawn if part.tag.endswith("text")]
    assert "a < b" in texts
    assert any("1,000: longest" in (text or "") for text in texts)


def test_a_chart_places_points_by_value() -> None:
    drawn = ElementTree.fromstring(line_chart([Line("x", [(0, 1), (50, 2), (100, 3)])], title="t", x_label="x"))
    (line,) = [part for part in drawn if part.tag.endswith("polyline")]
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.1)
    assert places[0][1] > places[2][1]
    flat = line_chart([Line("flat", [(1, 2.0), (2, 2.0)])], title="t", x_label="x")
    assert "nan" not in flat


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert perplexity.main(["--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_kv_types_are_compared_and_their_pools_counted(folder: Path) -> None:
    config = read_config(folder)
    rows = []
    for name in ("bfloat16", "int8", "int4"):
        rows.append(kv_formats.kept(name, measure(str(folder), Attention("full"), TEXT[:120], kv_dtype=name), config))
    base, eight, four = rows
    assert abs(eight.measured.perplexity() / base.measured.perplexity() - 1) < 0.01
    size = config.head_dim
    assert eight.token_bytes / base.token_bytes == (size + 2) / (2 * size)
    assert four.token_bytes / base.token_bytes == (size // 2 + 2) / (2 * size)
    assert eight.wide_sequences / base.wide_sequences > 1.9
    assert eight.sequences * eight.token_bytes * kv_formats.SEQUENCE_TOKENS <= kv_formats.ROOM
    table = kv_formats.table(rows)
    assert "| bfloat16 |" in table
    assert "+0.000 %" in table
    assert "1.000 x" in table
    assert json.loads(json.dumps(kv_formats.summary(rows)))["int8"]["sequences"] == eight.sequences


def test_a_kv_type_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--kv-dtype must be auto or one of"):
        measure(str(folder), Attention("full"), TEXT[:20], kv_dtype="int3")
