"""The multi-tenant workload: what is read, what is asked, what comes of samples; no system lies about its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from bench.engine.clients import parse_event, request_body, tokens_of
from bench.engine.drive import Figures, Sample, ask_all, decode_rate, measure_system, workload_figures
from bench.engine.scenario import FIRST_ID, Ask, MultiTenant, make_asks, read_scenario
from pando.errors import ConfigError

SMALL = MultiTenant(tenants=2, system_tokens=8, requests=6, unique_tokens=3, output_tokens=4, concurrency=2)


class Counting:
    """Answers with so many tokens in two messages and knows how many were open at once."""

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens
        self.open = self.most_open = 0

    async def stream(self, ask: Ask, *, reuse: bool) -> AsyncGenerator[int, None]:
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        await asyncio.sleep(0)
        yield 1
        yield (self.tokens or ask.output_tokens) - 1
        self.open -= 1


def test_the_scenario_in_the_repository_is_the_cpu_setting() -> None:
    assert read_scenario() == MultiTenant(4, 1024, 64, 64, 32, 16)


@pytest.mark.parametrize(
    ("text", "says"),
    [("tenants = 1", "exactly"), ("= 1", "cannot be read"), ("", "exactly")],
    ids=["a part", "no toml", "empty"],
)
def test_what_is_no_scenario_is_said_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "one.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_scenario(tmp_path / "one.toml")


@pytest.mark.parametrize("value", ["0", "1.5", "true", '"4"'])
def test_values_are_whole_numbers(tmp_path: Path, value: str) -> None:
    text = read_text_with(tenants=value)
    (tmp_path / "one.toml").write_text(text)
    with pytest.raises(ConfigError, match="tenants must be a whole number"):
        read_scenario(tmp_path / "one.toml")


def read_text_with(**changes: str) -> str:
    values = dict.fromkeys(MultiTenant.__dataclass_fields__, "1") | changes
    return "\n".join(f"{name} = {value}" for name, value in values.items())


def test_tenants_take_turns_and_share_nothing_but_their_own_head() -> None:
    asks = make_asks(SMALL, 1000, 0)
    assert [ask.tenant for ask in asks] == ["tenant-0", "tenant-1"] * 3
    heads = {ask.tenant: {other.token_ids[:8] for other in asks if other.tenant == ask.tenant} for ask in asks}
    assert all(len(found) == 1 for found in heads.values())
    assert heads["tenant-0"] != heads["tenant-1"]
    assert len({ask.token_ids[8:] for ask in asks}) == 6
    assert all(len(ask.token_ids) == SMALL.prompt_tokens and min(ask.token_ids) >= FIRST_ID for ask in asks)


def test_a_round_is_the_same_again_and_no_other_begins_as_it() -> None:
    assert make_asks(SMALL, 1000, 1) == make_asks(SMALL, 1000, 1)
    assert not {ask.token_ids[:8] for ask in make_asks(SMALL, 1000, 1)} & {
        ask.token_ids[:8] for ask in make_asks(SMALL, 1000, 2)
    }


def test_figures_of_samples() -> None:
    samples = [Sample(0.0, 0.5, 2.0, 4), Sample(0.0, 1.0, 4.0, 4), Sample(2.0, 2.25, 4.0, 4)]
    assert workload_figures(samples, reuse=True) == {
        "workload_tokens_per_s": 3.0,
        "ttft_p50_s": 0.5,
        "ttft_p99_s": 1.0,
    }
    assert workload_figures(samples, reuse=False) == {
        "without_tokens_per_s": 3.0,
        "without_ttft_p50_s": 0.5,
        "without_ttft_p99_s": 1.0,
    }
    assert decode_rate(samples[0]) == 2.0


def test_no_more_are_open_than_the_scenario_says() -> None:
    system = Counting()
    samples = asyncio.run(ask_all(system, make_asks(SMALL, 1000, 0), concurrency=2, reuse=True))
    assert len(samples) == 6 and system.most_open == 2
    assert all(one.tokens == 4 and one.sent_at <= one.first_at <= one.ended_at for one in samples)


def test_an_answer_of_another_length_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="asked for 4 tokens and got 3"):
        asyncio.run(ask_all(Counting(3), make_asks(SMALL, 1000, 0), concurrency=2, reuse=True))


def test_figures_that_came_before_a_failure_are_kept() -> None:
    found: Figures = {}
    with pytest.raises(RuntimeError, match="asked for 1 tokens and got 3"):
        asyncio.run(measure_system(_Prefill(), 1000, SMALL, 0, found))
    assert {"workload_tokens_per_s", "without_ttft_p99_s", "decode_tokens_per_s"} <= set(found)
    assert "prefill_tokens_per_s" not in found


class _Prefill(Counting):
    """Answers a long prompt with too much."""

    async def stream(self, ask: Ask, *, reuse: bool) -> AsyncGenerator[int, None]:
        yield 1
        yield 2 if ask.output_tokens == 1 else ask.output_tokens - 1


def test_servers_are_told_not_to_reuse_each_in_its_way() -> None:
    ask = Ask("tenant-1", (300, 301), 2)
    shared, alone = (request_body(ask, "m", "vllm", reuse=reuse) for reuse in (True, False))
    assert shared["cache_salt"] == "tenant-1"
    assert alone["cache_salt"] != request_body(ask, "m", "vllm", reuse=False)["cache_salt"]
    assert [request_body(ask, "m", "llama.cpp", reuse=reuse)["cache_prompt"] for reuse in (True, False)] == [
        True,
        False,
    ]
    assert shared["prompt"] == [300, 301] and shared["ignore_eos"]


def test_events_of_a_stream() -> None:
    assert parse_event(b"\n") is None
    assert parse_event(b"data: [DONE]\n") is None
    assert tokens_of(parse_event(b'data: {"choices": [{"text": "", "token_ids": [5, 6]}]}') or {}) == 2
    assert tokens_of(parse_event(b'data: {"choices": [{"text": "a"}]}') or {}) == 1
    assert tokens_of(parse_event(b'data: {"choices": [], "usage": {"completion_tokens": 3}}') or {}) == 0
    with pytest.raises(RuntimeError, match="the server says"):
        parse_event(b'data: {"error": {"message": "no"}}')
