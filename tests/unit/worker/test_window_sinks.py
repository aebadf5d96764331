"""Windows and sinks of whole models against a dense decoder that moves keys to where the gap is closed."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kvstore.block_pool import BlockPool
from kvstore.scope import Region, ScopeRoot
from pando.errors import ConfigError
from tests.oracle import make_checkpoint, oracle_logits
from tests.runner_driver import Driven, Driver, load, random_tokens
from worker.admission import SchedulerLimits
from worker.batch import SamplingParams
from worker.layers.rotary import RotaryEmbedding, inverse_frequencies
from worker.model_runner import ModelRunner
from worker.models.config import ModelConfig, Rope, read_config, with_window
from worker.scheduler import Scheduler
from worker.sequence import SequenceRequest

FAMILIES = ("llama3", "qwen3", "mistral", "qwen2-mixed")
LENGTH = 130
BLOCK = 8


class Dense:
    """One sequence in float64, token by token and head by head: nothing here is shared with the worker but the
    configuration. For a query past the window, keys are turned anew at their places in [sinks, window]."""

    def __init__(self, folder: Path, window: int, sinks: int) -> None:
        self.config = read_config(folder)
        self.window, self.sinks = window, sinks
        self.weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
        self.frequencies = inverse_frequencies(self.config.rope, self.config.head_dim).double()

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        config = self.config
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[torch.tensor(token_ids)]
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, name + "input_layernorm"), layer, name + "self_attn.")
            y = self._norm(x, name + "post_attention_layernorm")
            gate, up = self._linear(y, name + "mlp.gate_proj"), self._linear(y, name + "mlp.up_proj")
            x = x + self._linear(F.silu(gate) * up, name + "mlp.down_proj")
        return self._norm(x, "model.norm") @ self.weights.get("lm_head.weight", embedding).T

    def _attention(self, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        config = self.config
        query, key, value = (
            self._linear(x, name + part).view(len(x), -1, config.head_dim) for part in ("q_proj", "k_proj", "v_proj")
        )
        if config.qk_norm:
            query, key = self._norm(query, name + "q_norm"), self._norm(key, name + "k_norm")
        group = config.num_heads // config.num_kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        own = config.windows[layer]
        window, sinks = (own, 0) if own is not None and own < self.window else (self.window, self.sinks)
        rows = []
        for position in range(len(x)):
            first = max(0, position - window + 1)
            seen = [*range(min(sinks, first)), *range(first, position + 1)]
            # Close the gap between sinks and window: what is seen has positions 0, 1, 2 and so on.
            places = torch.arange(len(seen))
            keys = self._turn(key[seen], places)
            scores = torch.einsum("hd,lhd->hl", self._turn(query[position : position + 1], places[-1:])[0], keys)
            weights = (scores / math.sqrt(config.head_dim)).softmax(-1)
            rows.append(torch.einsum("hl,lhd->hd", weights, value[seen]).flatten())
        return self._linear(torch.stack(rows), name + "o_proj")

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions.double()[:, None] * self.frequencies
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.weights[name + ".weight"]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("windows") / request.param
    make_checkpoint(made, request.param)
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("window") / "small-model"
    make_checkpoint(made, "llama3")
    return made


def give_back(driver: Driver, driven: Driven) -> int:
    """Take away every block that the next step may not read, and spoil it; how many the sequence still holds."""
    spec = driver.runner.spec
    assert spec.window is not None
    first = -(-spec.sinks // BLOCK)
    for index in range(first, max(first, (driven.computed - spec.window + 1) // BLOCK)):
        if driven.blocks[index] >= 0:
            driver.runner.cache.blocks[driven.blocks[index]] = torch.nan
            driver.free.insert(0, driven.blocks[index])
            driven.blocks[index] = -1
    return sum(block >= 0 for block in driven.blocks)


def logits(runner: ModelRunner, tokens: list[int], chunk: int, seed: int) -> torch.Tensor:
    """All logits in chunks, giving back between them what left the window."""
    driver = Driver(runner, seed)
    driven = driver.start([])
    parts = []
    for end in range(chunk, len(tokens) + chunk, chunk):
        driven.tokens = tokens[:end]
        parts.append(driver.logits(driven))
        give_back(driver, driven)
    return torch.cat(parts)


@pytest.mark.parametrize(("window", "sinks"), [(32, 4), (24, 0), (17, 11), (5, 20)], ids=str)
def test_chunks_with_holes_are_the_dense_decoder(folder: Path, window: int, sinks: int) -> None:
    tokens = random_tokens(LENGTH, seed=3)
    expected = Dense(folder, window, sinks).logits(tokens)
    runner = load(folder, window=window, sinks=sinks)
    for chunk in (1, 7, LENGTH):
        torch.testing.assert_close(logits(runner, tokens, chunk, chunk).double(), expected, atol=3e-4, rtol=0)
    runner.close()


def test_the_dense_decoder_is_the_oracle_where_the_window_is_wide(folder: Path, tmp_path: Path) -> None:
    tokens = random_tokens(60, seed=5)
    expected = oracle_logits(make_checkpoint(tmp_path, folder.name), tokens).double()
    torch.testing.assert_close(Dense(folder, 500, 4).logits(tokens), expected, atol=3e-4, rtol=0)


def test_a_short_sequence_sees_all(folder: Path) -> None:
    tokens = random_tokens(36, seed=4)
    plain, limited = load(folder), load(folder, window=32, sinks=4)
    ours = logits(limited, tokens, 36, 1)
    torch.testing.assert_close(ours, Driver(plain).logits(Driver(plain).start(tokens)), atol=3e-4, rtol=0)
    plain.close()
    limited.close()


def test_generation_goes_on_at_constant_memory_in_any_batch(small: Path) -> None:
    runner = load(small, window=24, sinks=4, device_blocks=24)
    alone, batch = Driver(runner, 1), Driver(runner, 2)
    first = alone.start(random_tokens(20, seed=6))
    others = [batch.start(random_tokens(length, seed=length)) for length in (3, 33)]
    again = batch.start(first.tokens)
    held = 0
    for _ in range(900):  # the model has 512 positions, the pool 192
        alone.step([first])
        held = max(held, give_back(alone, first))
    for _ in range(900):
        batch.step([others[0], again, others[1]])
        for driven in (*others, again):
            held = max(held, give_back(batch, driven))
    assert again.tokens == first.tokens
    assert held <= 6
    assert runner.spec.max_model_len > 10**9
    runner.close()


def test_the_scheduler_takes_prompts_and_answers_longer_than_the_pool(small: Path) -> None:
    runner = load(small, window=64, sinks=4, device_blocks=44)
    runner.cache.blocks.fill_(torch.nan)
    tokens = random_tokens(500, seed=7)
    limits = SchedulerLimits(32, 4, 10, runner.spec.max_model_len, window=64, sinks=4)
    pool = BlockPool(44, BLOCK)  # of 352 positions
    scheduler = Scheduler(pool, limits)
    region = (Region(ScopeRoot(bytes(16)), None),)
    for number, length in enumerate((500, 20)):
        prompt = array("I", tokens[:length])
        scheduler.submit(SequenceRequest(number, prompt, length, region, SamplingParams(max_tokens=300)), 0.0)
    found: list[list[int]] = [[], []]
    while scheduler.num_sequences:
        batch = scheduler.schedule(0.0)
        assert batch is not None
        scheduler.complete(batch, runner.execute(batch))
        for output in scheduler.take_outputs():
            found[output.sequence_id] += output.token_ids
    for length, answer in zip((500, 20), found, strict=True):
        assert len(answer) == 300 or answer[-1] in runner.spec.eos_token_ids
        driver = Driver(runner, length)
        driven = driver.start(tokens[:32])
        for end in range(32, length, 32):
            driven.tokens = tokens[:end]
            driver.logits(driven)
            give_back(driver, driven)
        driven.tokens = tokens[:length]
        for _ in answer:
            driver.step([driven])
            give_back(driver, driven)
        assert driven.tokens[length:] == answer
    runner.close()


def test_what_the_spec_says(folder: Path) -> None:
    wide = read_config(folder)
    config = with_window(wide, 16, 4)
    assert config.num_kept == 16
    assert config.sink_reach == 19
    own = {"mistral": (16, 16, 16), "qwen2-mixed": (16, 13, 13)}
    assert config.windows == own.get(folder.name, (16, 16, 16))
    assert wide.num_kept == (21 if folder.name == "mistral" else None)
    assert with_window(wide, 40, 4).windows[1] == {"mistral": 21, "qwen2-mixed": 13}.get(folder.name, 40)


def test_other_attention_is_another_fingerprint(small: Path) -> None:
    made = [load(small, **how) for how in ({}, {"window": 32}, {"window": 32, "sinks": 4}, {"window": 33, "sinks": 4})]
    assert len({runner.spec.fingerprint for runner in made}) == 4
    assert [(runner.spec.window, runner.spec.sinks) for runner in made] == [(None, 0), (32, 0), (32, 4), (33, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinks": 4}, "sinks need a window"),
        ({"window": 510, "sinks": 4}, "window 510 and sinks 4 are over the model's 512 positions"),
        ({"window": 300, "sinks": 4, "device_blocks": 39}, "need 320 token positions of KV and the pool has 312"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(small: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(small, **settings)


@pytest.mark.parametrize("start", [1_000, 1_000_000, 1_000_000_000])
def test_relative_positions_stay_exact_however_far(start: int) -> None:
    rotary = RotaryEmbedding(Rope(), 64, device=torch.device("cpu"), dtype=torch.float32, endless=True)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 64, generator=generator).double()
    near = _score(rotary, query, key, 700, 0)
    assert _score(rotary, query, key, start + 700, start) == pytest.approx(near, abs=2e-5)


def test_float32_angles_would_not_do() -> None:
    plain = RotaryEmbedding(Rope(), 64, device=torch.device("cpu"), dtype=torch.float32)
    query = torch.ones(64, dtype=torch.float64)
    wrong = [
        abs(_score(plain, query, query, p + 1, p) - _score(plain, query, query, 1, 0)) for p in range(10**6, 10**6 + 64)
    ]
    assert max(wrong) > 0.02


def _score(rotary: RotaryEmbedding, query: torch.Tensor, key: torch.Tensor, at: int, key_at: int) -> float:
    angles = rotary(torch.tensor([at, key_at]))
    halves = torch.stack((query, key)).view(2, 1, 2, 32)
    turned = halves * angles.cos.double() + halves.flip(2) * angles.sin.double()
    return float((turned[0] * turned[1]).sum())


def test_config_is_kept_where_nothing_is_asked(small: Path) -> None:
    config: ModelConfig = read_config(small)
    assert replace(config) == config
    assert (config.window, config.sinks, config.sink_reach, config.sink_window) == (None, 0, None, None)
