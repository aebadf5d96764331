"""The story of a request once it is checked and tokenized: place it, send it, hand its tokens on.

Knows no text and no gRPC. Invariant: a client gets each token index once and in order, from the current attempt only,
and whatever way the story ends, its reservation is given back once and the worker is told.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from kvstore.block import BlockKey, WorkerId
from kvstore.block_key import block_keys, token_bytes
from kvstore.scope import TenantId
from pando.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ResourceExhausted,
    Unavailable,
)
from router.fleet import Fleet, FleetModel
from router.link_messages import AdmissionReport, LinkOutput, SamplingChoice, Submission
from router.member import CONTEXT_LENGTH, KV_CAPACITY, QUEUE_FULL, TRIED, Ask, Reservation
from router.placement import Placement, Prompt
from router.prefix_catalog import PrefixRecord
from router.recent import RecentPlacements
from router.scopes import Cover, Scopes
from router.tenants import NO_QUOTA, KvQuota
from router.worker_link import LinkStream, WorkerLost

__all__ = ["AdmissionReport", "Dispatch", "SamplingChoice", "TokenDelta", "TokenRequest"]

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A checked request. `deadline` is a time of the event loop's clock.

    `groups`, `ttft_s` (its time to first token, 0 for none) and `quota` are the tenant's. `warming` is set on the
    request that computes a published prefix, which is then its whole prompt; `only` names the one worker that shall run
    a request.
    """

    request_id: str
    tenant: TenantId
    token_ids: array[int]  # 'I', at least one, every id inside the vocabulary
    sampling: SamplingChoice
    deadline: float
    priority: int = 0
    no_store: bool = False
    groups: tuple[str, ...] = ()
    ttft_s: float = 0.0
    quota: KvQuota = NO_QUOTA
    warming: PrefixRecord | None = None
    only: WorkerId | None = None


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of the answer: `token_ids[0]` is generated token number `first_index`.

    `finish` is "stop" or "length" on the last delta; a story that ends otherwise raises. `admission` comes with the
    first delta. `predicted_cached` is how many prompt tokens the router thought the worker held.
    """

    first_index: int
    token_ids: tuple[int, ...]
    finish: str | None
    stop_token_id: int | None
    admission: AdmissionReport | None
    worker: str
    attempts: int
    predicted_cached: int


class Dispatch:
    """Runs requests on the fleet, for one event loop.

    A request that finds no ready worker waits up to `ready_grace_s` for one.
    """

    def __init__(self, fleet: Fleet, scopes: Scopes, *, ready_grace_s: float = 5.0) -> None:
        self.recent = RecentPlacements()
        self._fleet = fleet
        self._scopes = scopes
        self._ready_grace_s = ready_grace_s

    def explain(self, request: TokenRequest) -> Placement:
        """Where the request would go now, without sending it."""
        return self._story(request).explain()

    def _story(self, request: TokenRequest) -> _Story:
        return _Story(self._fleet, self._scopes, self.recent, request, self._ready_grace_s)

    async def stream(self, request: TokenRequest) -> AsyncIterator[TokenDelta]:
        """The answer as it comes; raises `pando.errors`. Closing or cancelling this cancels at the worker."""
        story = self._story(request)
        try:
            while True:
                delta = await story.next_delta()
                yield delta
                if delta.finish is not None:
                    return
        finally:
            story.leave()


class _Story:
    """One request on its way: at most one attempt at a time holds a reservation and a stream."""

    def __init__(
        self, fleet: Fleet, scopes: Scopes, recent: RecentPlacements, request: TokenRequest, ready_grace_s: float
    ) -> None:
        self._fleet = fleet
        self._scopes = scopes
        self._recent = recent
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._wait_until = min(request.deadline, self._loop.time() + ready_grace_s)
        self._attempt = 0
        self._next_index = 0
        self._place: tuple[WorkerId, int] = (WorkerId(""), 0)  # worker and epoch of the newest attempt
        self._tried: set[tuple[WorkerId, int]] = set()
        self._failure: LinkOutput | None = None
        self._reservation: Reservation | None = None
        self._stream: LinkStream | None = None

    async def next_delta(self) -> TokenDelta:
        """The next tokens, from whichever attempt gets that far."""
        while True:
            try:
                if self._failure is not None:
                    self._fail(self._failure)
                stream = self._stream or await self._begin()
                delta = self._accept(await self._take(stream))
            except WorkerLost:
                self._after_loss()
                continue
            if delta is not None:
                return delta

    def leave(self) -> None:
        """End the present attempt: the worker is told, the place given back. Idempotent, never waits."""
        reservation, self._reservation = self._reservation, None
        stream, self._stream = self._stream, None
        if reservation is not None and stream is not None:
            reservation.link.close(stream)
        if reservation is not None:
            reservation.release()

    # An attempt

    async def _begin(self) -> LinkStream:
        self._attempt += 1
        self._failure = None
        request = self._request
        cover, self._reservation = await self._reserve()
        self._place = self._reservation.worker, self._reservation.epoch
        self._stream = self._reservation.link.submit(
            Submission(
                request_id=request.request_id,
                attempt=self._attempt,
                token_ids=request.token_ids,
                num_prompt_tokens=len(request.token_ids),
                regions=cover.regions,
                owners=cover.owners,
                sampling=request.sampling,
                priority=request.priority,
                timeout_s=request.deadline - self._loop.time(),
                no_store=request.no_store,
                quota=request.quota,
            )
        )
        return self._stream

    async def _reserve(self) -> tuple[Cover, Reservation]:
        """A place at a worker, waiting a little for one if none is ready."""
        while True:
            self._check_deadline()
            model = self._fleet.model_spec
            if model is not None:
                cover, ask = self._ask(model)
                answer = self._fleet.reserve(ask)
                placement = answer.placement if isinstance(answer, Reservation) else answer
                self._recent.add(self._request.request_id, self._attempt, placement)
                if isinstance(answer, Reservation):
                    return cover, answer
                _raise_if_hopeless(answer)
            left = self._wait_until - self._loop.time()
            if left <= 0 or not await self._fleet.wait_ready(left):
                self._check_deadline()
                raise Unavailable("no worker is ready", reason="NO_WORKER", retry_after_s=RETRY_AFTER_S)

    def explain(self) -> Placement:
        """Where the next attempt would go."""
        model = self._fleet.model_spec
        if model is None:
            raise Unavailable("no worker is ready", reason="NO_WORKER", retry_after_s=RETRY_AFTER_S)
        return self._fleet.explain(self._ask(model)[1])

    def _ask(self, model: FleetModel) -> tuple[Cover, Ask]:
        request = self._request
        cover = self._cover(model)
        keys = block_keys(cover.regions, request.token_ids, model.block_size)
        tie_key = self._tie_key(cover, keys, model.block_size)
        prompt = Prompt(len(request.token_ids), request.sampling.max_tokens, tie_key, request.ttft_s)
        tried = frozenset(self._tried)
        return cover, Ask(prompt, keys, stores=not request.no_store, avoid=tried, only=request.only)

    def _cover(self, model: FleetModel) -> Cover:
        request = self._request
        if request.warming is not None:
            return self._scopes.cover_of(model, request.warming)
        return self._scopes.cover(model, request.tenant, request.groups, request.token_ids)

    def _tie_key(self, cover: Cover, keys: Sequence[BlockKey], block_size: int) -> bytes:
        """The first private block: a head that all share must not bring everything to one worker."""
        shared = (cover.regions[0].end or 0) // block_size
        if shared < len(keys):
            return keys[shared]
        rest = self._request.token_ids[shared * block_size :]
        return cover.regions[-1].root + token_bytes(rest)

    async def _take(self, stream: LinkStream) -> list[LinkOutput]:
        try:
            async with asyncio.timeout_at(self._request.deadline):
                return await stream.take()
        except TimeoutError:
            raise _deadline_exceeded() from None

    def _check_deadline(self) -> None:
        if self._loop.time() >= self._request.deadline:
            raise _deadline_exceeded()

    # What comes back

    def _accept(self, outputs: list[LinkOutput]) -> TokenDelta | None:
        """Fence, merge and book outputs; None if there was nothing new in them."""
        reservation = self._reservation
        assert reservation is not None, "outputs belong to an attempt"
        first_index = self._next_index
        token_ids: tuple[int, ...] = ()
        admission: AdmissionReport | None = None
        end: LinkOutput | None = None
        for output in outputs:
            if not self._is_next(output):
                continue
            token_ids += output.token_ids
            self._next_index += len(output.token_ids)
            admission = admission or output.admission
            end = output if output.finish is not None else None
        if token_ids:
            reservation.started(admission)
        if admission is not None:
            self._recent.found(self._request.request_id, admission.cached_tokens)
        delta = TokenDelta(
            first_index=first_index,
            token_ids=token_ids,
            finish=end.finish if end is not None and end.finish in ("stop", "length") else None,
            stop_token_id=end.stop_token_id if end is not None else None,
            admission=admission,
            worker=reservation.worker,
            attempts=self._attempt,
            predicted_cached=reservation.placement.predicted_cached,
        )
        if end is not None:
            self.leave()
            self._failure = end if delta.finish is None else None
        return delta if token_ids or delta.finish is not None else None

    def _is_next(self, output: LinkOutput) -> bool:
        """Whether this is the current attempt's next output; one that leaves a gap ends the story."""
        if output.attempt != self._attempt or output.first_index < self._next_index:
            return False
        if output.first_index > self._next_index:
            raise self._defect("a worker skipped a token")
        return True

    # Ends and second tries

    def _fail(self, end: LinkOutput) -> None:
        """Raise what the worker's end means: an error for the client, or `WorkerLost` where another may do it."""
        match end.finish, end.reason:
            case "deadline", _:
                raise _deadline_exceeded()
            case ("rejected", "DRAINING") | ("error", "WORKER_STOPPED") | ("cancelled", _):
                self._fleet.note_draining(*self._place)
                raise WorkerLost
            case "rejected", "QUEUE_FULL":
                self._tried.add(self._place)
                raise WorkerLost
            case "rejected", ("CONTEXT_LENGTH" | "KV_CAPACITY"):
                raise _too_long(end.reason)
        raise self._defect(f"worker {self._place[0]} ended it as {end.finish}, {end.reason}")

    def _after_loss(self) -> None:
        """Go on with another attempt, or raise. What a client has begun to read cannot be begun again."""
        self.leave()
        self._failure = None
        if self._next_index:
            raise Unavailable(
                "the worker was lost and the answer is incomplete", reason="WORKER_LOST", retry_after_s=RETRY_AFTER_S
            )
        if self._attempt >= MAX_ATTEMPTS:
            if self._tried:
                raise _queues_full()
            raise Unavailable("no worker kept the request", reason="WORKER_LOST", retry_after_s=RETRY_AFTER_S)
        logger.info("request %s goes to another worker, attempt %d", self._request.request_id, self._attempt + 1)

    def _defect(self, what: str) -> InternalError:
        error_id = uuid.uuid4().hex[:12]
        logger.error("error %s: request %s: %s", error_id, self._request.request_id, what)
        return InternalError("the worker failed at this request", error_id=error_id)


def _raise_if_hopeless(placement: Placement) -> None:
    """Waiting for a worker helps only where none that is ready has said no."""
    if placement.retry_after_s:
        raise ResourceExhausted(
            "no worker could start it in the tenant's time", reason="TTFT", retry_after_s=placement.retry_after_s
        )
    reasons = {reason for _, reason in placement.excluded}
    if reasons & {QUEUE_FULL, TRIED}:
        raise _queues_full()
    for reason in (KV_CAPACITY, CONTEXT_LENGTH):
        if reason in reasons:
            raise _too_long(reason.upper().replace(" ", "_"))


def _deadline_exceeded() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the answer was complete")


def _queues_full() -> ResourceExhausted:
    return ResourceExhausted("every worker's queue is full", reason="QUEUE_FULL", retry_after_s=RETRY_AFTER_S)


def _too_long(reason: str) -> InvalidRequest:
    if reason == "CONTEXT_LENGTH":
        return InvalidRequest("prompt and max_tokens are over the model's context", reason=reason)
    return InvalidRequest("no worker has enough KV blocks for prompt and max_tokens", reason=reason)
