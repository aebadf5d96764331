"""The story of a request once it is checked and tokenized: place it, send it, hand its tokens on.

Knows no text and no gRPC. Invariant: a client gets each token index of an answer once and in order, from the current
attempt only, and whatever way the story ends, its reservation is given back once and the worker is told.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvstore.block import BlockKey, WorkerId
from kvstore.block_key import block_keys, token_bytes
from kvstore.scope import TenantId
from pando.errors import InternalError, Unavailable
from router.fleet import Fleet, FleetModel
from router.link_messages import AdmissionReport, LinkOutput, SamplingChoice, Submission
from router.member import Reservation
from router.placement import Placement, Prompt
from router.prefix_catalog import PrefixRecord
from router.recent import RecentPlacements
from router.refusals import RETRY_AFTER_S, deadline_exceeded, no_worker, queues_full, raise_if_hopeless, too_long
from router.scopes import Cover, Scopes
from router.standing import Ask
from router.tenants import NO_QUOTA, KvQuota
from router.worker_link import LinkStream, WorkerLost

__all__ = ["AdmissionReport", "Dispatch", "SamplingChoice", "Story", "TokenDelta", "TokenRequest"]

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A checked request. `deadline` is a time of the event loop's clock.

    `groups`, `ttft_s` (its time to first token, 0 for none), `quota` and `weight` are the tenant's. `warming` is set on
    the request that computes a published prefix, which is then its whole prompt; `only` names the one worker that shall
    run a request. Each of `fork_seeds` asks for one more answer: its own but for the prompt, which is computed once for
    all.
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
    weight: int = 1
    warming: PrefixRecord | None = None
    only: WorkerId | None = None
    fork_seeds: tuple[int, ...] = ()


@dataclass(slots=True)  # not frozen: there is one for every token, and to freeze it takes longer than to make it
class TokenDelta:
    """New tokens of answer `index`: `token_ids[0]` is its generated token number `first_index`.

    `finish` is "stop" or "length" on an answer's last delta; a story that ends otherwise raises. `admission` comes with
    the first delta of all. `predicted_cached` is how many prompt tokens the router thought the worker held.
    """

    first_index: int
    token_ids: tuple[int, ...]
    finish: str | None
    stop_token_id: int | None
    admission: AdmissionReport | None
    worker: str
    attempts: int
    predicted_cached: int
    index: int = 0


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
        return self.stream(request).explain()

    def stream(self, request: TokenRequest) -> Story:
        """The answers as they come. Closing the story, or cancelling who waits for it, cancels at the worker."""
        return Story(self._fleet, self._scopes, self.recent, request, self._ready_grace_s)


@dataclass(slots=True)
class _Answer:
    """How far one answer is: tokens given to the reader, and whether more will follow."""

    seed: int
    next_index: int = 0
    is_over: bool = False


class Story:
    """One request on its way: at most one attempt at a time holds a reservation and a stream.

    An iterator of deltas that raises `pando.errors`. Whoever does not read it to its end closes it.
    """

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
        self._answers = [_Answer(seed) for seed in (request.sampling.seed, *request.fork_seeds)]
        self._num_open = len(self._answers)
        self._running: list[int] = []  # the answers of the newest attempt, in the order of its stream's sequences
        self._place: tuple[WorkerId, int] = (WorkerId(""), 0)  # worker and epoch of the newest attempt
        self._tried: set[tuple[WorkerId, int]] = set()
        self._failure: LinkOutput | None = None
        self._reservation: Reservation | None = None
        self._stream: LinkStream | None = None
        self._alarm: asyncio.TimerHandle | None = None  # of the stream, at the deadline
        self._deltas: deque[TokenDelta] = deque()

    def __aiter__(self) -> Story:
        return self

    async def __anext__(self) -> TokenDelta:
        """The next tokens, from whichever attempt gets that far."""
        try:
            while not self._deltas:
                if not self._num_open:
                    raise StopAsyncIteration
                await self._advance()
        except BaseException:  # however the story ends, its place is given back
            self._close()
            raise
        return self._deltas.popleft()

    def drop(self, index: int) -> None:
        """Want no more of one answer. Idempotent, never waits."""
        answer = self._answers[index]
        if answer.is_over:
            return
        if self._stream is not None and self._reservation is not None:
            self._reservation.link.cancel(self._stream, self._running.index(index))
        self._end(answer)

    async def aclose(self) -> None:
        """Want no more at all. Idempotent, never waits."""
        self._close()

    def _close(self) -> None:
        for answer in self._answers:
            answer.is_over = True
        self._num_open = 0
        self._deltas.clear()
        self._leave()

    def _open(self) -> list[int]:
        return [index for index, answer in enumerate(self._answers) if not answer.is_over]

    def _end(self, answer: _Answer) -> None:
        """Nothing more will come of an answer; with the last one the place is given back."""
        answer.is_over = True
        self._num_open -= 1
        if not self._num_open:
            self._leave()
        elif self._reservation is not None:
            self._reservation.end_answer()

    def _leave(self) -> None:
        """End the present attempt: the worker is told, the place given back. Idempotent, never waits."""
        reservation, self._reservation = self._reservation, None
        stream, self._stream = self._stream, None
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.cancel()
        if stream is not None:
            stream.end_wait()  # nobody wakes it once its alarm is off
        if reservation is not None and stream is not None:
            reservation.link.close(stream)
        if reservation is not None:
            reservation.release()

    # An attempt

    async def _begin(self) -> LinkStream:
        self._attempt += 1
        request, self._running = self._request, self._open()
        seed, *fork_seeds = (self._answers[index].seed for index in self._running)
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
                sampling=replace(request.sampling, seed=seed),
                priority=request.priority,
                timeout_s=request.deadline - self._loop.time(),
                no_store=request.no_store,
                quota=request.quota,
                weight=request.weight,
                fork_seeds=tuple(fork_seeds),
                pull=self._reservation.pull,
            )
        )
        # One timer a stream, not one a wait: a wait there is for every token.
        self._alarm = self._loop.call_at(request.deadline, self._stream.end_wait)
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
                raise_if_hopeless(answer)
            left = self._wait_until - self._loop.time()
            if left <= 0 or not await self._fleet.wait_ready(left):
                self._check_deadline()
                raise no_worker()

    def explain(self) -> Placement:
        """Where the next attempt would go."""
        model = self._fleet.model_spec
        if model is None:
            raise no_worker()
        return self._fleet.explain(self._ask(model)[1])

    def _ask(self, model: FleetModel) -> tuple[Cover, Ask]:
        request = self._request
        cover = self._cover(model)
        keys = block_keys(cover.regions, request.token_ids, model.block_size)
        tie_key = self._tie_key(cover, keys, model.block_size)
        prompt = Prompt(len(request.token_ids), request.sampling.max_tokens, tie_key, request.ttft_s)
        return cover, Ask(
            prompt,
            keys,
            stores=not request.no_store,
            avoid=frozenset(self._tried),
            only=request.only,
            num_answers=len(self._running),
            owner=cover.regions[-1].root,
            weight=request.weight,
        )

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

    def _check_deadline(self) -> None:
        if self._loop.time() >= self._request.deadline:
            raise deadline_exceeded()

    # What comes back

    async def _advance(self) -> None:
        """Take what the present attempt has to say, or begin one."""
        try:
            if self._failure is not None:
                self._fail(self._failure)
            stream = self._stream or await self._begin()
            outputs = await stream.take()
        except WorkerLost:
            self._after_loss()
            return
        if not outputs:
            raise deadline_exceeded()
        for fork, index in enumerate(self._running):
            said = [output for output in outputs if output.fork == fork] if len(self._running) > 1 else outputs
            if said and not self._answers[index].is_over:
                self._accept(index, said)
        if self._failure is not None:
            self._leave()

    def _accept(self, index: int, outputs: list[LinkOutput]) -> None:
        """Fence, merge and book outputs of one answer."""
        reservation, answer = self._reservation, self._answers[index]
        assert reservation is not None, "outputs belong to an attempt"
        first_index = answer.next_index
        token_ids: tuple[int, ...] = ()
        admission: AdmissionReport | None = None
        end: LinkOutput | None = None
        for output in outputs:
            if not self._is_next(output, answer.next_index):
                continue
            token_ids += output.token_ids
            answer.next_index += len(output.token_ids)
            admission = admission or output.admission
            end = output if output.finish is not None else None
        if token_ids:
            reservation.started(admission)
        if admission is not None:
            self._recent.found(self._request.request_id, admission.cached_tokens)
        finish = end.finish if end is not None and end.finish in ("stop", "length") else None
        if token_ids or finish is not None:
            delta = TokenDelta(
                first_index=first_index,
                token_ids=token_ids,
                finish=finish,
                stop_token_id=end.stop_token_id if end is not None else None,
                admission=admission,
                worker=reservation.worker,
                attempts=self._attempt,
                predicted_cached=reservation.placement.predicted_cached,
                index=index,
            )
            self._deltas.append(delta)
        if finish is not None:
            self._end(answer)
        elif end is not None:
            self._failure = self._failure or end
            if end.reason == "QUEUE_FULL":
                reservation.refused()

    def _is_next(self, output: LinkOutput, next_index: int) -> bool:
        """Whether this is the current attempt's next output; one that leaves a gap ends the story."""
        if output.attempt != self._attempt or output.first_index < next_index:
            return False
        if output.first_index > next_index:
            raise self._defect("a worker skipped a token")
        return True

    # Ends and second tries

    def _fail(self, end: LinkOutput) -> None:
        """Raise what the worker's end means: an error for the client, or `WorkerLost` where another may do it."""
        match end.finish, end.reason:
            case "deadline", _:
                raise deadline_exceeded()
            case "cancelled", "PURGED":
                raise Unavailable("the tenant's cache was purged while this ran", reason="PURGED")
            case ("rejected", "DRAINING") | ("error", "WORKER_STOPPED") | ("cancelled", _):
                self._fleet.note_draining(*self._place)
                raise WorkerLost
            case "rejected", "QUEUE_FULL":
                self._tried.add(self._place)
                raise WorkerLost
            case "rejected", ("CONTEXT_LENGTH" | "KV_CAPACITY"):
                raise too_long(end.reason)
        raise self._defect(f"worker {self._place[0]} ended it as {end.finish}, {end.reason}")

    def _after_loss(self) -> None:
        """Go on with another attempt, or raise. What a client has begun to read cannot be begun again."""
        self._leave()
        self._failure = None
        if any(self._answers[index].next_index for index in self._open()):
            raise Unavailable(
                "the worker was lost and the answer is incomplete", reason="WORKER_LOST", retry_after_s=RETRY_AFTER_S
            )
        if self._attempt >= MAX_ATTEMPTS:
            if self._tried:
                raise queues_full()
            raise Unavailable("no worker kept the request", reason="WORKER_LOST", retry_after_s=RETRY_AFTER_S)
        logger.info("request %s goes to another worker, attempt %d", self._request.request_id, self._attempt + 1)

    def _defect(self, what: str) -> InternalError:
        error_id = uuid.uuid4().hex[:12]
        logger.error("error %s: request %s: %s", error_id, self._request.request_id, what)
        return InternalError("the worker failed at this request", error_id=error_id)
