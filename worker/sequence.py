"""A request inside the worker: its tokens, how many of them are computed, its blocks, and what it tells the outside.

Knows nothing of the queue, the budget or the wire. Computed tokens never exceed tokens, and a generated token, once
in an output, never changes.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from enum import Enum, auto

from kvstore.block_table import BlockTable
from kvstore.flights import Wait
from kvstore.scope import Region, ScopeRoot
from kvstore.tiers import Load
from worker.batch import SamplingParams
from worker.holdings import OwnerQuota, Publishers


class State(Enum):
    """WAITING <-> RUNNING (admission, preemption), either -> FINISHED."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    DEADLINE = "deadline"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Fork:
    """One more answer to the same prompt, told apart by its number and drawn with its own seed."""

    sequence_id: int
    seed: int


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """What a router asks for.

    `token_ids` is the prompt and, on a continuation, the tokens already delivered after it; `sampling.max_tokens`
    counts generated tokens from `num_prompt_tokens`. `deadline` is a time of the engine's clock. Each of `forks` is
    a sequence of its own once the prompt is computed. `weight` is the owner's share of a busy worker beside others'.
    `pulled` are positions whose KV came from another worker for it, which took `pull_s`; `peer_lacks`: nothing came, as
    that worker had none of it.
    """

    sequence_id: int
    token_ids: array[int]
    num_prompt_tokens: int
    regions: tuple[Region, ...]
    sampling: SamplingParams
    priority: int = 0
    deadline: float | None = None
    no_store: bool = False
    forks: tuple[Fork, ...] = ()
    publishers: Publishers = ()
    quota: OwnerQuota | None = None
    weight: int = 1
    pulled: range = range(0)
    pull_s: float = 0.0
    peer_lacks: bool = False

    @property
    def owner(self) -> ScopeRoot:
        """Who asks: the scope that belongs to it alone."""
        return self.regions[-1].root

    def fork(self, fork: Fork) -> SequenceRequest:
        """The request that a fork stands for."""
        return replace(self, sequence_id=fork.sequence_id, sampling=replace(self.sampling, seed=fork.seed), forks=())

    def parted(self, sequence_id: int) -> tuple[SequenceRequest, SequenceRequest]:
        """The request of this one of its sequences, and that of all others, of which there is one at least."""
        if sequence_id == self.sequence_id:
            return replace(self, forks=()), replace(self.fork(self.forks[0]), forks=self.forks[1:])
        (one,) = (fork for fork in self.forks if fork.sequence_id == sequence_id)
        return self.fork(one), replace(self, forks=tuple(fork for fork in self.forks if fork is not one))


@dataclass(frozen=True, slots=True)
class AdmissionFacts:
    """What admission found, counted once. Cached counts are positions of `token_ids`, published ones included; each
    lies in one tier. `cached_cpu_published_tokens` are those of the published ones that the CPU tier had. The last
    three are of the request's pull."""

    cached_device_tokens: int
    cached_published_tokens: int
    queue_s: float
    blocks_copied: int = 0
    cached_cpu_tokens: int = 0
    cached_cpu_published_tokens: int = 0
    cached_remote_tokens: int = 0
    cached_remote_published_tokens: int = 0
    pulled_tokens: int = 0
    pull_s: float = 0.0
    peer_lacks: bool = False


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of one sequence, or its end. `first_index` is the index of `token_ids[0]` among generated tokens."""

    sequence_id: int
    first_index: int
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None
    admission: AdmissionFacts | None = None
    stop_token_id: int | None = None
    reason: str = ""


class Sequence:
    """One request's live state; the scheduler is its only owner."""

    __slots__ = (
        "_reported_admission",
        "admission",
        "arrival",
        "forks",
        "load",
        "newest_draw",
        "num_computed_tokens",
        "num_launched_tokens",
        "num_prompt_tokens",
        "num_unread_tokens",
        "origin",
        "queued_at",
        "request",
        "state",
        "table",
        "token_ids",
        "unsettled",
        "wait",
    )

    def __init__(self, request: SequenceRequest, *, arrival: int, now: float) -> None:
        self.request = request
        self.arrival = arrival
        self.queued_at = now
        self.state = State.WAITING
        self.token_ids = array("I", request.token_ids)
        self.num_prompt_tokens = request.num_prompt_tokens
        self.num_computed_tokens = 0
        self.num_launched_tokens = 0
        """Being computed in steps that have not ended."""
        self.num_unread_tokens = 0
        """Drawn in those steps: behind `token_ids`, and not known yet."""
        self.newest_draw = 0
        """Which one of its step's answer the newest of these is."""
        self.table: BlockTable | None = None
        self.wait: Wait | None = None
        """While it waits: for what another sequence is about to compute or load."""
        self.load: Load | None = None
        """While it waits: blocks of its own on their way from the CPU tier."""
        self.admission: AdmissionFacts | None = None
        self.forks: list[Sequence] = []
        """Until its prompt is computed: those that go on from there with it; `origin` leads back."""
        self.origin: Sequence | None = None
        self.unsettled = False
        """Whether its next step may have to copy a block that others hold too."""
        self._reported_admission = False

    @property
    def id(self) -> int:
        return self.request.sequence_id

    @property
    def blocks(self) -> BlockTable:
        """The table of a sequence that runs."""
        assert self.table is not None, "a running sequence has a block table"
        return self.table

    def must_wait(self) -> bool:
        """Whether another try to admit it has no sense yet."""
        return (self.wait is not None and not self.wait.ready) or (self.load is not None and not self.load.done)

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was done for it, here or, before it came here, elsewhere."""
        return self.admission is None and self.load is None and not self.num_generated_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Smaller goes first: by priority, then by arrival. Unique."""
        return (-self.request.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        """Its length, tokens that are not known yet included."""
        return len(self.token_ids) + self.num_unread_tokens

    @property
    def next_position(self) -> int:
        """The first one that no step computes yet."""
        return self.num_computed_tokens + self.num_launched_tokens

    @property
    def is_decided(self) -> bool:
        """Whether it ends by its length with what is drawn already, so that no step is left for it."""
        return self.num_tokens >= self.max_num_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt, those delivered by an earlier worker included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_num_tokens(self) -> int:
        """Longest this sequence may become."""
        return self.num_prompt_tokens + self.request.sampling.max_tokens

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Stop ids, until `min_tokens` have been generated; for the next draw."""
        sampling = self.request.sampling
        drawn = self.num_tokens - self.num_prompt_tokens
        return sampling.stop_token_ids if drawn < sampling.min_tokens else ()

    def launched(self, num_tokens: int, draw: int | None) -> None:
        """A step computes so many tokens of it, and draws the next one as this one of its answer."""
        self.num_launched_tokens += num_tokens
        if draw is not None:
            self.num_unread_tokens += 1
            self.newest_draw = draw

    def ended(self, num_tokens: int, *, drawn: bool) -> None:
        """That step has ended: the tokens are computed, and the drawn one can be read."""
        self.num_launched_tokens -= num_tokens
        self.num_computed_tokens += num_tokens
        self.num_unread_tokens -= drawn

    def release(self) -> None:
        """Give back its blocks; what was computed in them is no more its own."""
        if self.table is not None:
            self.table.release()
        self.table = self.load = None
        self.num_computed_tokens = 0

    def follow(self, origin: Sequence) -> None:
        """Its prompt is computed, by `origin`, which also says what admission found."""
        self.origin = None
        self._reported_admission = True
        self.admission = origin.admission

    def append(self, token_id: int) -> SequenceOutput:
        """Take a sampled token; the output says whether it was the last."""
        index = self.num_generated_tokens
        self.token_ids.append(token_id)
        finish: Finish | None = None
        if token_id in self.request.sampling.stop_token_ids:
            finish = Finish.STOP
        elif len(self.token_ids) >= self.max_num_tokens:
            finish = Finish.LENGTH
        return SequenceOutput(
            sequence_id=self.id,
            first_index=index,
            token_ids=(token_id,),
            finish=finish,
            admission=self._admission_once(),
            stop_token_id=token_id if finish is Finish.STOP else None,
        )

    def end(self, finish: Finish, reason: str = "") -> SequenceOutput:
        """The output of a sequence that ends without a token."""
        return SequenceOutput(self.id, self.num_generated_tokens, finish=finish, reason=reason)

    def _admission_once(self) -> AdmissionFacts | None:
        if self._reported_admission:
            return None
        self._reported_admission = True
        return self.admission
