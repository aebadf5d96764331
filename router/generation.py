"""From a checked request to text deltas: tokenize, dispatch, turn tokens into text, stop, and say what it took.

Knows no gRPC; placement and links are dispatch's. Invariant: every text delta is whole characters, the last one of a
call carries the usage, and nothing is left running behind a call that ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, cast

from kvstore.scope import TenantId
from pando.errors import DeadlineExceeded, InternalError, PandoError, Unavailable
from router.admission import Admission
from router.dispatch import AdmissionReport, SamplingChoice, TokenDelta, TokenRequest
from router.metrics import Metrics, Spent
from router.model_card import ModelCard
from router.placement import Placement
from router.tenants import Tenant
from router.text_answer import TextAnswer
from router.tokenizer import Tokenizer
from router.validation import Checked, fit_max_tokens

# Errors that are Pando's to answer for; every other kind is the caller's mistake, or a limit.
_FAILURES = (InternalError, Unavailable, DeadlineExceeded)


class TokenSource(Protocol):
    """Runs a request of tokens on the fleet: `router.dispatch.Dispatch`, or a test's stand-in."""

    def stream(self, request: TokenRequest) -> AsyncIterator[TokenDelta]: ...

    def explain(self, request: TokenRequest) -> Placement: ...


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call took. Its prompt counts once; what was cached of it is what its first answer found."""

    prompt_tokens: int
    completion_tokens: int
    found: AdmissionReport
    predicted_cached: int
    ttft_ms: float
    total_ms: float
    worker: str
    attempts: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of answer `index`. `finish` is set on its last delta, `usage` on the last of the call."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish: str | None = None
    matched_stop: str = ""
    usage: Usage | None = None


class Generation:
    """Serves checked requests of any tenant, for one event loop."""

    def __init__(
        self,
        source: TokenSource,
        tokenizer: Tokenizer,
        admission: Admission,
        metrics: Metrics,
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._admission = admission
        self._metrics = metrics
        self._clock = clock or asyncio.get_running_loop().time

    async def run(
        self, tenant: Tenant, checked: Checked, card: ModelCard, deadline: float
    ) -> AsyncGenerator[TextDelta, None]:
        """The deltas of a call. `deadline` is a time of the clock; closing the generator cancels what runs."""
        began = self._clock()
        with self._counted(tenant.id, deadline), self._admission.enter(tenant, checked.request_id) as request_id:
            prompt = await self._encode(checked)
            first = TokenRequest(
                request_id=request_id,
                tenant=tenant.id,
                token_ids=prompt,
                sampling=_sampling(checked, fit_max_tokens(checked, len(prompt), card)),
                deadline=deadline,
                priority=checked.priority,
                no_store=checked.no_store,
                groups=tenant.groups,
                ttft_s=tenant.ttft_s,
                quota=tenant.quota,
            )
            requests = _for_each_answer(first, checked.n)
            call = _Call(requests, [self._answer(checked) for _ in requests], began)
            try:
                async with aclosing(self._deltas(call)) as deltas:
                    async for delta in deltas:
                        yield delta
            finally:
                self._count_used(tenant.id, call)

    async def explain(self, tenant: Tenant, checked: Checked, card: ModelCard) -> Placement:
        """Where a call would go now, without sending it."""
        prompt = await self._encode(checked)
        sampling = _sampling(checked, fit_max_tokens(checked, len(prompt), card))
        request = TokenRequest(
            checked.request_id, tenant.id, prompt, sampling, 0.0, groups=tenant.groups, ttft_s=tenant.ttft_s
        )
        return self._source.explain(request)

    async def _encode(self, checked: Checked) -> array[int]:
        if isinstance(checked.prompt, str):
            return await self._tokenizer.encode(checked.prompt)
        if isinstance(checked.prompt, array):
            return checked.prompt
        return await self._tokenizer.encode_chat(checked.prompt)

    def _answer(self, checked: Checked) -> TextAnswer:
        return TextAnswer(
            self._tokenizer.detokenizer(), checked.stop, checked.min_tokens, interval=checked.stream_interval
        )

    def _deltas(self, call: _Call) -> AsyncGenerator[TextDelta, None]:
        return self._one(call, 0) if len(call.requests) == 1 else self._merged(call)

    async def _one(self, call: _Call, index: int) -> AsyncGenerator[TextDelta, None]:
        """One answer, ended by its last token or by a stop string; either way the source is closed."""
        answer = call.answers[index]
        stream = cast("AsyncGenerator[TokenDelta, None]", self._source.stream(call.requests[index]))
        async with aclosing(stream):
            async for tokens in stream:
                call.saw(index, tokens, self._clock)
                piece = answer.take(tokens.token_ids, tokens.finish, tokens.stop_token_id)
                if piece is not None:
                    usage = call.usage(self._clock()) if call.finished else None
                    yield TextDelta(
                        call.request_id, index, piece.text, piece.token_ids, piece.finish, piece.matched_stop, usage
                    )
                if answer.finish is not None:
                    return
        raise InternalError("the answer ended without a reason")

    async def _merged(self, call: _Call) -> AsyncGenerator[TextDelta, None]:
        """All answers side by side, as their tokens come."""
        queue: asyncio.Queue[TextDelta | BaseException] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(call, index, queue)) for index in range(len(call.requests))]
        try:
            while True:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.usage is not None:
                    return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, call: _Call, index: int, queue: asyncio.Queue[TextDelta | BaseException]) -> None:
        try:
            async with aclosing(self._one(call, index)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
        except Exception as error:  # noqa: BLE001 - raised again by the reader of the queue
            queue.put_nowait(error)

    @contextmanager
    def _counted(self, tenant: TenantId, deadline: float) -> Iterator[None]:
        """Count the call and how it ended; a client that goes away is no failure, a deadline that passes is."""
        self._metrics.begin(tenant)
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            late = self._clock() >= deadline
            (self._metrics.fail if late else self._metrics.cancel)(tenant)
            raise
        except PandoError as error:
            (self._metrics.fail if isinstance(error, _FAILURES) else self._metrics.refuse)(tenant)
            raise
        except Exception:
            self._metrics.fail(tenant)
            raise

    def _count_used(self, tenant: TenantId, call: _Call) -> None:
        """Count what was computed and delivered, even of a call that broke off."""
        if call.first_token_at is None:
            return
        used = call.usage(self._clock())
        self._metrics.first_token(used.ttft_ms / 1000)
        self._metrics.used(
            tenant,
            Spent(
                prompt_tokens=used.prompt_tokens,
                completion_tokens=used.completion_tokens,
                cached_device=used.found.cached_device,
                cached_cpu=used.found.cached_cpu,
                cached_remote=used.found.cached_remote,
                cached_published=used.found.cached_published,
                predicted_cached=used.predicted_cached,
                blocks_copied=used.found.blocks_copied,
            ),
        )


class _Call:
    """The answers of one call while they run."""

    def __init__(self, requests: list[TokenRequest], answers: list[TextAnswer], began: float) -> None:
        self.requests = requests
        self.answers = answers
        self.request_id = requests[0].request_id
        self.first_token_at: float | None = None
        self._began = began
        self._found = AdmissionReport()
        self._copied = 0
        self._last: dict[int, TokenDelta] = {}

    @property
    def finished(self) -> bool:
        """Whether every answer is."""
        return all(answer.finish is not None for answer in self.answers)

    def saw(self, index: int, tokens: TokenDelta, clock: Callable[[], float]) -> None:
        """Keep what usage will say."""
        if self.first_token_at is None and tokens.token_ids:
            self.first_token_at = clock()
        if tokens.admission is not None:
            self._copied += tokens.admission.blocks_copied
            if index == 0:
                self._found = tokens.admission
        self._last[index] = tokens

    def usage(self, now: float) -> Usage:
        """What the call took up to now."""
        first = self._last.get(0) or next(iter(self._last.values()))
        started = now if self.first_token_at is None else self.first_token_at
        return Usage(
            prompt_tokens=len(self.requests[0].token_ids),
            completion_tokens=sum(answer.num_tokens for answer in self.answers),
            found=replace(self._found, blocks_copied=self._copied),
            predicted_cached=first.predicted_cached,
            ttft_ms=(started - self._began) * 1000,
            total_ms=(now - self._began) * 1000,
            worker=first.worker,
            attempts=max(delta.attempts for delta in self._last.values()),
        )


def derived_seed(seed: int, index: int) -> int:
    """The seed of answer `index`: the request's own for the first, unrelated ones for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8, person=b"pando.seed")
    return int.from_bytes(digest.digest(), "little")


def _sampling(checked: Checked, max_tokens: int) -> SamplingChoice:
    return SamplingChoice(
        max_tokens=max_tokens,
        min_tokens=checked.min_tokens,
        temperature=checked.temperature,
        top_k=checked.top_k,
        top_p=checked.top_p,
        min_p=checked.min_p,
        seed=secrets.randbits(64) if checked.seed is None else checked.seed,
        stop_token_ids=checked.stop_token_ids,
    )


def _for_each_answer(first: TokenRequest, n: int) -> list[TokenRequest]:
    others = [
        replace(
            first,
            request_id=f"{first.request_id}/{index}",
            sampling=replace(first.sampling, seed=derived_seed(first.sampling.seed, index)),
        )
        for index in range(1, n)
    ]
    return [first, *others]
