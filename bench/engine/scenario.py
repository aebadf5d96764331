"""The multi-tenant workload: who asks what, as token ids. Greedy, to the full number of output tokens.

Knows no system that answers. Invariant: the same scenario and round give the same prompts, and no prompt of one round
begins as one of another does, so nothing of an earlier round is found cached.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from pando.errors import ConfigError

SCENARIO = Path(__file__).resolve().parents[1] / "scenarios" / "multi_tenant.toml"
DECODE_PROMPT, DECODE_TOKENS, PREFILL_TOKENS = 64, 128, 4096
"""Of the requests that are sent one at a time."""
FIRST_ID = 300
"""Smaller ids are special ones and bytes, of which some make no text alone."""


@dataclass(frozen=True, slots=True)
class MultiTenant:
    """`tenants` with `system_tokens` each; `requests` in all, by turns, at most `concurrency` of them open at once."""

    tenants: int
    system_tokens: int
    requests: int
    unique_tokens: int
    output_tokens: int
    concurrency: int

    @property
    def prompt_tokens(self) -> int:
        """Of one request."""
        return self.system_tokens + self.unique_tokens


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    tenant: str
    token_ids: tuple[int, ...]
    output_tokens: int


def read_scenario(path: Path = SCENARIO) -> MultiTenant:
    """Raises `ConfigError` with one line on a file that is not such a scenario."""
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a scenario") from error
    names = [one.name for one in fields(MultiTenant)]
    if sorted(found) != sorted(names):
        raise ConfigError(f"{path} must have exactly {', '.join(names)}")
    for name in names:
        if type(found[name]) is not int or found[name] < 1:
            raise ConfigError(f"{path}: {name} must be a whole number, 1 or more")
    return MultiTenant(**found)


def make_asks(scenario: MultiTenant, vocab_size: int, number: int) -> list[Ask]:
    """All requests of round `number`."""
    rng = random.Random(f"workload {number}")
    heads = [random_ids(rng, scenario.system_tokens, vocab_size) for _ in range(scenario.tenants)]
    return [
        Ask(
            f"tenant-{index % scenario.tenants}",
            heads[index % scenario.tenants] + random_ids(rng, scenario.unique_tokens, vocab_size),
            scenario.output_tokens,
        )
        for index in range(scenario.requests)
    ]


def single_ask(purpose: str, tokens: int, output_tokens: int, vocab_size: int, number: int) -> Ask:
    """A request alone, equal to no other of any purpose or round."""
    rng = random.Random(f"{purpose} {number}")
    return Ask("tenant-0", random_ids(rng, tokens, vocab_size), output_tokens)


def random_ids(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    """Ids that each have a text of their own."""
    return tuple(rng.choices(range(FIRST_ID, vocab_size), k=count))
