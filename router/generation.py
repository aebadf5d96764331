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
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

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


class TokenStream(Protocol):
    """The tokens of a request's answers as they come: `router.dispatch.Story`, or a test's stand-in."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> TokenDelta: ...

    def drop(self, index: int) -> None:
        """Want no more of one answer."""

    async def aclose(self) -> None:
        """Want no more at all."""


class TokenSource(Protocol):
    """Runs a request of tokens on the fleet: `router.dispatch.Dispatch`, or a test's stand-in."""

    def stream(self, request: TokenRequest) -> TokenStream: ...

    def explain(self, request: TokenRequest) -> Placement: ...


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call took. Its prompt counts once: it is computed once for all answers."""

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
        async with self._entered(tenant, checked.request_id, deadline) as request_id:
            prompt = await self._encode(checked)
            await self._admission.charge(tenant, len(prompt))
            if self._clock() >= deadline:
                raise DeadlineExceeded("the deadline passed before the prompt was read")
            sampling = _sampling(checked, fit_max_tokens(checked, len(prompt), card))
            request = TokenRequest(
                request_id=request_id,
                tenant=tenant.id,
                token_ids=prompt,
                sampling=sampling,
                deadline=deadline,
                priority=checked.priority,
                no_store=checked.no_store,
                groups=tenant.groups,
                ttft_s=tenant.ttft_s,
                quota=tenant.quota,
                weight=tenant.weight,
                fork_seeds=tuple(derived_seed(sampling.seed, index) for index in range(1, checked.n)),
            )
            call = _Call(request, [self._answer(checked) for _ in range(checked.n)], began)
            try:
                async with aclosing(self._deltas(call)) as deltas:
                    async for delta in deltas:
                        yield delta
            finally:
                self._count_used(tenant.id, call)

    @asynccontextmanager
    async def _entered(self, tenant: Tenant, request_id: str, deadline: float) -> AsyncIterator[str]:
        with self._counted(tenant.id, deadline):
            async with self._admission.enter(tenant, request_id) as entered:
                yield entered

    async def explain(self, tenant: Tenant, checked: Checked, card: ModelCard) -> Placement:
        """Where a call would go now, without sending it."""
        prompt = await self._encode(checked)
        sampling = _sampling(checked, fit_max_tokens(checked, len(prompt), card))
        request = TokenRequest(
            checked.request_id,
            tenant.id,
            prompt,
            sampling,
            0.0,
            groups=tenant.groups,
            ttft_s=tenant.ttft_s,
            weight=tenant.weight,
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

    async def _deltas(self, call: _Call) -> AsyncGenerator[TextDelta, None]:
        """All answers as their tokens come, each ended by its last token or by a stop string."""
        async with aclosing(self._source.stream(call.request)) as stream:
            async for tokens in stream:
                call.saw(tokens, self._clock)
                answer = call.answers[tokens.index]
                piece = answer.take(tokens.token_ids, tokens.finish, tokens.stop_token_id)
                if answer.finish is not None:
                    stream.drop(tokens.index)
                if piece is not None:
                    usage = call.usage(self._clock()) if call.finished else None
                    yield TextDelta(
                        call.request.request_id,
                        tokens.index,
                        piece.text,
                        piece.token_ids,
                        piece.finish,
                        piece.matched_stop,
                        usage,
                    )
                if call.finished:
                    return
        raise InternalError("an answer ended without a reason")

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

    def __init__(self, request: TokenRequest, answers: list[TextAnswer], began: float) -> None:
        self.request = request
        self.answers = answers
        self.first_token_at: float | None = None
        self._began = began
        self._found: AdmissionReport | None = None
        self._first: TokenDelta | None = None
        self._attempts = 1

    @property
    def finished(self) -> bool:
        """Whether every answer is."""
        return all(answer.finish is not None for answer in self.answers)

    def saw(self, tokens: TokenDelta, clock: Callable[[], float]) -> None:
        """Keep what usage will say."""
        if self.first_token_at is None and tokens.token_ids:
            self.first_token_at = clock()
        self._found = self._found or tokens.admission
        self._first = self._first or tokens
        self._attempts = tokens.attempts

    def usage(self, now: float) -> Usage:
        """What the call took up to now."""
        first = self._first
        assert first is not None, "a call without a delta has no usage"
        started = now if self.first_token_at is None else self.first_token_at
        return Usage(
            prompt_tokens=len(self.request.token_ids),
            completion_tokens=sum(answer.num_tokens for answer in self.answers),
            found=self._found or AdmissionReport(),
            predicted_cached=first.predicted_cached,
            ttft_ms=(started - self._began) * 1000,
            total_ms=(now - self._began) * 1000,
            worker=first.worker,
            attempts=self._attempts,
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
