"""Multi-tenant workloads as token ids, and what a client measures when it sends one.

Knows the Python client alone: what it times is what any caller sees. The same workload is sent to every fleet compared.
"""

from __future__ import annotations

import asyncio
import pydoc_data.topics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pando.client import AsyncClient


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `token_ids` begins with its tenant's system prompt. Waves are sent one after the other."""

    number: int
    tenant: str
    wave: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """One answered request; times in seconds as the client saw them, counts as the server's usage tells them."""

    ask: Ask
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    answer: tuple[int, ...]
    worker: str


@dataclass(frozen=True, slots=True)
class Shape:
    """`waves` are the numbers of requests sent at once; tenants take turns. The first wave finds nothing cached."""

    tenants: int = 4
    head_tokens: int = 1024
    waves: tuple[int, ...] = (4, 4, 16, 20, 20)
    max_tokens: int = 32

    @property
    def requests(self) -> int:
        """All requests of all waves."""
        return sum(self.waves)


async def make_asks(target: str, shape: Shape) -> list[Ask]:
    """The workload: a system prompt of exactly `head_tokens` tokens for each tenant, a short unique question for each
    request. The text is Python's own documentation, which is wherever Python is."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    part = len(text) // shape.tenants
    names = [f"tenant-{chr(ord('a') + i)}" for i in range(shape.tenants)]
    async with AsyncClient(target, tenant="setup") as client:
        heads = {
            name: await _head(client, text[i * part : (i + 1) * part], shape.head_tokens)
            for i, name in enumerate(names)
        }
        waves = [wave for wave, size in enumerate(shape.waves) for _ in range(size)]
        asks = []
        for number, wave in enumerate(waves):
            name = names[number % shape.tenants]
            question = await client.tokenize(text=f"\n\n{number}. What does this say about case {number}? Answer: ")
            asks.append(Ask(number, name, wave, heads[name] + tuple(question)))
    return asks


async def send(target: str, asks: Sequence[Ask], shape: Shape, done: Callable[[Measured], None]) -> list[Measured]:
    """Send every wave, each when the one before is answered, all requests of a wave at once."""
    tenants = sorted({ask.tenant for ask in asks})
    clients = {tenant: AsyncClient(target, tenant=tenant) for tenant in tenants}
    found: list[Measured] = []
    try:
        for wave in sorted({ask.wave for ask in asks}):
            now = [ask for ask in asks if ask.wave == wave]
            found += await asyncio.gather(*(_measure(clients[ask.tenant], ask, shape.max_tokens, done) for ask in now))
    finally:
        for client in clients.values():
            await client.close()
    return found


async def warm_up(target: str, times: int) -> None:
    """A few short requests of a tenant of their own, so that no measured one pays for first uses."""
    async with AsyncClient(target, tenant="setup") as client:
        await asyncio.gather(
            *(client.generate(text=f"{i}. Hello", max_tokens=8, ignore_eos=True) for i in range(times))
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


async def _head(client: AsyncClient, text: str, num_tokens: int) -> tuple[int, ...]:
    ids = await client.tokenize(text=text[: num_tokens * 8])
    if len(ids) < num_tokens:
        raise ValueError("the text is too short for the system prompt")
    return tuple(ids[:num_tokens])


async def _measure(client: AsyncClient, ask: Ask, max_tokens: int, done: Callable[[Measured], None]) -> Measured:
    began = time.perf_counter()
    first = 0.0
    answer: list[int] = []
    usage = None
    stream = client.stream(token_ids=list(ask.token_ids), max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    async for chunk in stream:
        if chunk.token_ids and not first:
            first = time.perf_counter() - began
        answer += chunk.token_ids
        usage = chunk.usage or usage
    assert usage is not None, "the last chunk of a call carries usage"
    total = time.perf_counter() - began
    measured = Measured(ask, first, total, usage.prompt_tokens, usage.cached_tokens, tuple(answer), usage.worker)
    done(measured)
    return measured
