"""One client for each kind of door: ours over gRPC, and the OpenAI-style completions of vLLM and llama.cpp over HTTP.

Knows addresses; who listens there was started elsewhere. Prompts are token ids for all, so nobody tokenizes.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp

from bench.engine.scenario import Ask
from pando.client import AsyncClient

TIMEOUT_S = 600.0


class PandoSystem:
    """Two fleets' routers, one that reuses and one that does not; tenants by name, as loopback allows."""

    def __init__(self, target: str, target_without: str) -> None:
        self._targets = {True: target, False: target_without}
        self._clients: dict[tuple[bool, str], AsyncClient] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients.values():
            await client.close()

    async def stream(self, ask: Ask, *, reuse: bool) -> AsyncGenerator[int, None]:
        """As `drive.System` says."""
        key = (reuse, ask.tenant)
        if key not in self._clients:
            self._clients[key] = AsyncClient(self._targets[reuse], tenant=ask.tenant, timeout=TIMEOUT_S)
        async for chunk in self._clients[key].stream(
            token_ids=ask.token_ids, max_tokens=ask.output_tokens, temperature=0.0, ignore_eos=True
        ):
            yield len(chunk.token_ids)


class OpenAISystem:
    """`/v1/completions` of one server. `dialect` says how it is told not to reuse: "vllm" by a salt of its own for each
    request, "llama.cpp" by a flag."""

    def __init__(self, url: str, model: str, dialect: str) -> None:
        self._url = url.rstrip("/") + "/v1/completions"
        self._model = model
        self._dialect = dialect
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # Some servers close a connection between two requests without a word: each request has its own, for all alike.
        limits = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def stream(self, ask: Ask, *, reuse: bool) -> AsyncGenerator[int, None]:
        """As `drive.System` says."""
        assert self._session is not None
        body = request_body(ask, self._model, self._dialect, reuse=reuse)
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{self._url}: {response.status} {(await response.text())[:500]}")
            seen = 0
            total = 0
            async for line in response.content:
                event = parse_event(line)
                if event is None:
                    continue
                count = tokens_of(event)
                total = max(total, int((event.get("usage") or {}).get("completion_tokens", 0)))
                seen += count
                yield count
            # Texts that were held back, and tokens without a text, are known by the usage at the end alone.
            yield total - seen


def request_body(ask: Ask, model: str, dialect: str, *, reuse: bool) -> dict[str, Any]:
    """The same request for either server."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ask.token_ids),
        "max_tokens": ask.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if dialect == "vllm":
        # A tenant's own salt keeps tenants apart, as our scopes do.
        return body | {"return_token_ids": True, "cache_salt": ask.tenant if reuse else secrets.token_hex(8)}
    return body | {"cache_prompt": reuse, "return_tokens": True}


def parse_event(line: bytes) -> dict[str, Any] | None:
    """One line of a server-sent stream; None for what carries no event."""
    text = line.strip()
    if not text.startswith(b"data:") or text == b"data: [DONE]":
        return None
    found: dict[str, Any] = json.loads(text.removeprefix(b"data:"))
    if "error" in found:
        raise RuntimeError(f"the server says: {found['error']}")
    return found


def tokens_of(event: Mapping[str, Any]) -> int:
    """How many tokens a completion's event brings: its ids, where the server gives them, else one for a text."""
    choices = event.get("choices") or []
    if not choices:
        return 0
    ids = choices[0].get("token_ids") or choices[0].get("tokens")
    return len(ids) if ids else int(bool(choices[0].get("text")))
