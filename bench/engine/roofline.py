"""The least time each figure of the comparison can take on the machine: operations at its rate, or bytes at its rate.

Knows shapes and counts, no system. Invariant: a bound counts only what every system must do, so a share over 1 means
that the bytes came from a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.engine.alone import step_bytes
from bench.engine.machine import Machine
from bench.engine.scenario import DECODE_PROMPT, DECODE_TOKENS, PREFILL_TOKENS, MultiTenant
from worker.models.config import ModelConfig

COMPUTE, MEMORY = "GFLOP/s", "GB/s"


@dataclass(frozen=True, slots=True)
class Work:
    """What must be done: `flop` operations and `read` bytes."""

    flop: float
    read: float

    def seconds(self, machine: Machine) -> float:
        """At the rates of the machine, both at once."""
        return max(self.flop / machine.matmul_gflop_s, self.read / machine.read_gb_s) / 1e9

    def limit(self, machine: Machine) -> str:
        """Which of the two takes longer."""
        compute = self.flop / machine.matmul_gflop_s >= self.read / machine.read_gb_s
        return COMPUTE if compute else MEMORY


@dataclass(frozen=True, slots=True)
class Bound:
    """Of one column. `amount` is what the column counts in the time of `work`: tokens for a rate, 1 for a time."""

    work: Work
    amount: float
    is_rate: bool

    def value(self, machine: Machine) -> float:
        """In the unit of the column."""
        seconds = self.work.seconds(machine)
        return self.amount / seconds if self.is_rate else seconds

    def share(self, measured: float, machine: Machine) -> float:
        """1 for a system that is as fast as the machine."""
        bound = self.value(machine)
        return measured / bound if self.is_rate else bound / measured


@dataclass(frozen=True, slots=True)
class Model:
    """A model in a dtype of `itemsize` bytes, KV too."""

    config: ModelConfig
    itemsize: int

    @property
    def kv_token_bytes(self) -> float:
        """KV of one token in all layers."""
        return 2.0 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim * self.itemsize

    def flop(self, first: int, count: int, heads: int) -> float:
        """Of `count` tokens from position `first` on, `heads` of which go through the logits head."""
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
        seen = count * first + count * (count + 1) / 2
        head = 2.0 * config.vocab_size * config.hidden_size
        return config.num_layers * (2.0 * layer * count + 4.0 * queries * seen) + heads * head

    def read(self, kv_tokens: float) -> float:
        """Bytes of one step: all weights once, and KV of so many tokens."""
        return step_bytes(self.config, self.itemsize, 1, 1, kv_tokens * self.kv_token_bytes)


def bounds(model: Model, scenario: MultiTenant) -> dict[str, Bound]:
    """By the name of the figure."""
    decode_flop = model.flop(DECODE_PROMPT + DECODE_TOKENS // 2, 1, 1)
    return {
        "workload_tokens_per_s": _workload(model, scenario, reuse=True),
        "ttft_p50_s": Bound(Work(_suffix(model, scenario), model.read(0)), 1, False),
        "ttft_p99_s": Bound(Work(_first_wave(model, scenario, reuse=True), model.read(0)), 1, False),
        "without_tokens_per_s": _workload(model, scenario, reuse=False),
        "without_ttft_p50_s": Bound(Work(model.flop(0, scenario.prompt_tokens, 1), model.read(0)), 1, False),
        "without_ttft_p99_s": Bound(Work(_first_wave(model, scenario, reuse=False), model.read(0)), 1, False),
        "decode_tokens_per_s": Bound(
            Work(decode_flop, model.read(DECODE_PROMPT + DECODE_TOKENS // 2)), 1, is_rate=True
        ),
        "prefill_tokens_per_s": Bound(Work(model.flop(0, PREFILL_TOKENS, 1), model.read(0)), PREFILL_TOKENS, True),
    }


def _workload(model: Model, scenario: MultiTenant, *, reuse: bool) -> Bound:
    """Every request's own tokens, what is common once or each time; decoding in full batches, where KV that is common
    is read once a step or for each sequence."""
    tokens = scenario.requests * scenario.output_tokens
    prompts = scenario.requests * _suffix(model, scenario)
    heads = scenario.tenants if reuse else scenario.requests
    prompts += heads * model.flop(0, scenario.system_tokens, 0)
    decode = scenario.requests * model.flop(
        scenario.prompt_tokens, scenario.output_tokens - 1, scenario.output_tokens - 1
    )
    open_at_once = min(scenario.concurrency, scenario.requests)
    common = min(scenario.tenants, open_at_once) if reuse else open_at_once
    own = scenario.unique_tokens + scenario.output_tokens / 2
    kv_tokens = common * scenario.system_tokens + open_at_once * own
    return Bound(Work(prompts + decode, tokens / open_at_once * model.read(kv_tokens)), tokens, True)


def _suffix(model: Model, scenario: MultiTenant) -> float:
    """A prompt whose system part is cached."""
    return model.flop(scenario.system_tokens, scenario.unique_tokens, 1)


def _first_wave(model: Model, scenario: MultiTenant, *, reuse: bool) -> float:
    """All that come at once at the start: the last of them has its first token when all prompts are computed."""
    wave = min(scenario.concurrency, scenario.requests)
    common = min(scenario.tenants, wave) if reuse else wave
    return common * model.flop(0, scenario.system_tokens, 0) + wave * _suffix(model, scenario)
