"""The simulated fleet: real traces' format, real placement and scheduler, figures that can be checked by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import zstandard

from bench.simulate.__main__ import compare, main
from bench.simulate.baselines import POLICIES
from bench.simulate.replay import FleetShape, Replay
from bench.simulate.report import Figures, document, figures, quantile
from bench.simulate.trace import Trace, read_trace
from bench.traces import Scenario, generate, write_trace
from kvstore.block import BlockKey
from pando.errors import ConfigError

Rows = Sequence[dict[str, Any]]
Write = Callable[[Rows], Path]

CONVERSATIONS = Scenario(
    requests=100, sessions_per_s=0.5, block_size=64, head=64, turns=5, mean_turn=300, mean_answer=40, mean_pause_s=5.0
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows to a file, compressed."""

    def write(rows: Rows) -> Path:
        path = tmp_path / "trace.jsonl.zst"
        assert write_trace(iter(rows), path) == len(rows)
        return path

    return write


@pytest.fixture
def conversations(write: Write) -> Trace:
    return read_trace(write(list(generate(CONVERSATIONS))), 64, 16)


def row(at_ms: float, prompt: int, answer: int, *hash_ids: int) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": prompt, "output_length": answer, "hash_ids": list(hash_ids)}


# Traces


def test_a_trace_is_cut_to_scale_and_its_ideal_is_counted(write: Write) -> None:
    rows = [row(500, 128, 30, 0, 1), row(1500, 160, 64, 0, 1, 2), row(2500, 128, 1, 0, 3)]
    trace = read_trace(write(rows), 64, 16)
    assert [request.arrival_s for request in trace.requests] == [0.0, 1.0, 2.0]
    assert [(request.prompt, request.answer) for request in trace.requests] == [(32, 8), (40, 16), (32, 1)]
    assert (trace.scale, trace.head, trace.num_distinct, trace.longest) == (4.0, 1, 4, 4)
    # Nothing, two blocks and one block of 104 positions.
    assert trace.ideal == pytest.approx((32 + 16) / 104)


def test_of_a_repeated_prompt_the_last_position_is_computed_again(write: Write) -> None:
    trace = read_trace(write([row(0, 128, 1, 0, 1), row(1000, 128, 1, 0, 1)]), 64, 16)
    assert trace.ideal == pytest.approx(31 / 64)


def test_tokens_agree_exactly_as_far_as_hash_ids_do(write: Write) -> None:
    rows = [row(0, 100, 1, 5, 6), row(1, 100, 1, 5, 7), row(2, 150, 1, 5, 6)]
    trace = read_trace(write(rows), 64, 16)
    first, second, third = (trace.tokens(request) for request in trace.requests)
    assert first[:16] == second[:16] and first[16] != second[16]
    assert first == third[: len(first)]
    # No id names the end of the third: nobody shares it.
    assert third[32:] == third[-1:] * (38 - 32) and third[-1] not in first


def test_requests_of_one_timestamp_are_spread_until_the_next(write: Write) -> None:
    trace = read_trace(write([row(at, 64, 1, n) for n, at in enumerate((0, 0, 0, 3000, 9000, 9000))]), 64, 16).spread()
    assert [request.arrival_s for request in trace.requests] == pytest.approx([0.0, 1.0, 2.0, 3.0, 9.0, 9.0])


def test_the_first_rows_of_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row(1000 * n, 64, 1, n)) + "\n" for n in range(5)))
    assert len(read_trace(path, 64, 16, 3).requests) == 3


@pytest.mark.parametrize("text", ["", "{}\n{}\n", "[1]\n", "no json\n", json.dumps(row(0, 0, 1)) + "\n"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_trace(path, 64, 16)


def test_positions_must_divide_a_block(write: Write) -> None:
    with pytest.raises(ConfigError, match="divide"):
        read_trace(write([row(0, 64, 1, 0), row(1, 64, 1, 0)]), 64, 48)


# Replays


def test_one_worker_with_room_for_all_reaches_the_ideal(conversations: Trace) -> None:
    shape = FleetShape(workers=1, cache_fraction=3.0, load=0.5)
    outcome = Replay(conversations, shape, "pando").run()
    found = figures(outcome, conversations.ideal)
    assert found.hit_ratio == pytest.approx(1.0, abs=0.01)
    assert outcome.evictions == 0
    assert found.max_over_mean_work == 1.0


def test_without_reuse_the_work_is_the_load(write: Write) -> None:
    rows = [row(100 * n, 640, 1, *range(10 * n, 10 * n + 10)) for n in range(200)]
    trace = read_trace(write(rows), 64, 16)
    outcome = Replay(trace, FleetShape(workers=2, step_s=0.0), "round_robin").run()
    assert figures(outcome, trace.ideal).hit_ratio == 1.0  # of nothing
    assert sum(fate.cached for fate in outcome.fates) == 0
    assert sum(outcome.busy_s) == pytest.approx(0.9 * 2 * trace.span_s, rel=1e-6)


def test_a_request_alone_waits_for_nobody(write: Write) -> None:
    trace = read_trace(write([row(0, 640, 1, *range(10)), row(60_000, 640, 1, *range(10, 20))]), 64, 16)
    shape = FleetShape(workers=1)
    outcome = Replay(trace, shape, "pando").run()
    replica = shape.replica(trace)
    steps = -(-160 // replica.max_batch_tokens)
    seconds = steps * replica.cost.step_s + 160 * replica.cost.token_s + 2 * shape.link_s
    assert outcome.fates[0].ttft_s == pytest.approx(seconds)


def test_nobody_knows_of_blocks_before_the_lag(write: Write) -> None:
    """The first worker has the prompt and is busy with another one: only who knows of its blocks goes there."""
    rows = [row(0, 640, 1, *range(10)), row(50_000, 6400, 1, *range(100, 200)), row(51_000, 640, 1, *range(10))]
    trace = read_trace(write(rows), 64, 16)
    for lag_s, cached in ((0.01, 159), (60.0, 0)):
        shape = FleetShape(workers=2, event_lag_s=lag_s, cache_fraction=4.0)
        outcome = Replay(trace, shape, "longest_prefix_10").run()
        assert outcome.fates[-1].cached == cached


def test_a_router_knows_what_another_one_sent_a_moment_ago(write: Write) -> None:
    """Long prompts come to two routers in turn, each a tenth of a second after the other, and no worker gets two."""
    rows = [row(3000 * (n // 2) + 120 * (n % 2), 6400, 1, *range(100 * n, 100 * n + 100)) for n in range(20)]
    trace = read_trace(write(rows), 64, 16)
    ttfts = [fate.ttft_s for fate in Replay(trace, FleetShape(workers=8, routers=2, load=0.2), "pando").run().fates]
    alone = [fate.ttft_s for fate in Replay(trace, FleetShape(workers=8, load=0.2), "pando").run().fates]
    assert ttfts == pytest.approx(alone)


def test_a_burst_over_all_routers_in_one_instant_is_spread(write: Write) -> None:
    """Each of eight routers gets one new prompt of eight, while workers differ in what they still have to do."""
    rows = [
        row(4000 * (n // 8), 640 * (1 + n * 7 % 13), 1, *range(100 * n, 100 * n + 1 + n * 7 % 13)) for n in range(480)
    ]
    trace = read_trace(write(rows), 64, 16)
    means = []
    for routers in (1, 8):
        fates = Replay(trace, FleetShape(workers=8, routers=routers), "pando").run().fates
        means.append(mean(fate.ttft_s or 0.0 for fate in fates[80:]))
    alone, together = means
    assert together < 1.5 * alone


def test_equal_replays_are_equal(conversations: Trace) -> None:
    shape = FleetShape(workers=3, routers=2)
    first, second = (Replay(conversations, shape, "pando").run() for _ in range(2))
    assert first == second


def test_every_policy_answers_every_request_and_the_pool_bounds_their_hits(conversations: Trace) -> None:
    shape = FleetShape(workers=4, cache_fraction=4.0)
    runs = {run.policy: run for run in compare(conversations, shape, list(POLICIES))}
    assert list(runs) == list(POLICIES)
    assert not any(run.refused for run in runs.values())
    most = runs["one_pool"].figures.hit_ratio
    assert all(run.figures.hit_ratio <= most + 0.001 for run in runs.values())
    assert runs["pando"].figures.hit_ratio > runs["round_robin"].figures.hit_ratio + 0.1
    assert all(run.figures.max_over_mean_work >= 1.0 for run in runs.values())


def test_exact_longest_prefix_brings_a_common_head_to_one_worker(conversations: Trace) -> None:
    runs = {run.policy: run for run in compare(conversations, FleetShape(workers=4), ["pando", "longest_prefix"])}
    assert runs["longest_prefix"].figures.max_over_mean_work == pytest.approx(4.0, rel=0.01)
    assert runs["pando"].figures.max_over_mean_work < 2.0


def test_a_coarser_scale_gives_the_same_figures(write: Write) -> None:
    """What makes long traces cheap: a block simulated with 8 positions instead of its 64 tokens.

    Asked of a policy that looks at nothing: one that does may decide otherwise for a difference in the last digit.
    """
    path = write(list(generate(replace(CONVERSATIONS, requests=150))))
    shape = FleetShape(workers=3, cache_fraction=0.5, load=0.7, batch_tokens=256)
    found = []
    for units in (64, 8):
        trace = read_trace(path, 64, units)
        found.append(figures(Replay(trace, shape, "round_robin").run(), trace.ideal))
    exact, coarse = found
    assert coarse.hit_ratio == pytest.approx(exact.hit_ratio, abs=0.03)
    assert coarse.ttft_mean_s == pytest.approx(exact.ttft_mean_s, rel=0.05)
    assert coarse.ttft_p99_s == pytest.approx(exact.ttft_p99_s, rel=0.1)
    assert coarse.max_over_mean_work == pytest.approx(exact.max_over_mean_work, rel=0.05)


def test_many_workers_with_many_routers(write: Write) -> None:
    trace = read_trace(write(list(generate(CONVERSATIONS))[:40]), 64, 16)
    outcome = Replay(trace, FleetShape(workers=100, routers=3), "pando").run()
    assert all(fate.ttft_s is not None for fate in outcome.fates)


def test_what_the_pool_has_is_kept_once_however_many_workers_it_has(conversations: Trace) -> None:
    replay = Replay(conversations, FleetShape(workers=16), "one_pool")
    runners = [place.replica.runner for place in replay._places.values()]
    assert len({id(runner._blocks) for runner in runners}) == 1
    replay.run()
    assert len(replay._index.workers()) == 1
    key = BlockKey(min(replay._index.keys_of(replay._index.workers()[0])))
    assert set(replay._index.match([key])) == set(replay._places)


# Reports


def test_quantiles_are_values_that_occurred() -> None:
    assert [quantile(range(1, 101), part) for part in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert quantile([7.0], 0.99) == 7.0


def test_the_document_has_what_its_readers_expect() -> None:
    made = document(0.5, 7, {"pando": Figures(0.9, 1.0, 2.0, 3.0, 1.1)})
    assert made == {
        "ideal": 0.5,
        "requests": 7,
        "policies": {
            "pando": {
                "hit_ratio": 0.9,
                "ttft_mean_s": 1.0,
                "ttft_p50_s": 2.0,
                "ttft_p99_s": 3.0,
                "max_over_mean_work": 1.1,
            }
        },
    }


def test_the_command_prints_one_document_and_writes_a_plot(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(list(generate(CONVERSATIONS))[:60])
    monkeypatch.setenv("PANDO_TRACES", str(path.parent))
    options = ["--block-size", "64", "--workers", "2", "--limit", "20", "--json", "--plot", str(tmp_path / "plots")]
    assert main(["--trace", path.name, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["requests"] == 20 and list(said["policies"]) == list(POLICIES)
    plots = {plot.name for plot in (tmp_path / "plots").iterdir()}
    assert plots == {"trace.svg", "trace.png"}
    drawn = (tmp_path / "plots" / "trace.svg").read_text()
    for policy, one in said["policies"].items():
        assert policy in drawn and f"{one['max_over_mean_work']:.2f}" in drawn


def test_the_command_shows_a_table(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(list(generate(CONVERSATIONS))[:40])
    assert main(["--trace", str(path), "--block-size", "64", "--policy", "pando"]) == 0
    assert "pando" in capsys.readouterr().out


def test_the_command_refuses_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", "/nowhere/trace.jsonl"]) == 2
    assert "no trace" in capsys.readouterr().err


# Public traces, where the machine has them


@pytest.mark.skipif("PANDO_TRACES" not in os.environ, reason="PANDO_TRACES names no folder of traces")
@pytest.mark.parametrize("name, block_size", [("mooncake_conversation", 512), ("taubench_airline_16", 16)])
def test_public_traces_fit_and_their_tail_is_shorter_than_in_turn(name: str, block_size: int) -> None:
    path = Path(os.environ["PANDO_TRACES"], f"{name}.jsonl.zst")
    trace = read_trace(path, block_size, 16, 300)
    runs = {run.policy: run.figures for run in compare(trace, FleetShape(), ["pando", "round_robin", "one_pool"])}
    assert runs["pando"].hit_ratio <= runs["one_pool"].hit_ratio + 0.001
    assert runs["pando"].ttft_p99_s < runs["round_robin"].ttft_p99_s


def test_zst_is_written_as_such(write: Write) -> None:
    assert zstandard.ZstdDecompressor().stream_reader(write([row(0, 1, 1, 0)]).read_bytes()).read().startswith(b"{")
