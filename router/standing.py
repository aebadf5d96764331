"""What is asked of workers, and what one of them is worth to any request: plain values, and why one is not chosen.

Knows no link and no live state. Invariant: a `Standing` does not depend on the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvstore.block import BlockKey, WorkerId
from kvstore.scope import ScopeRoot
from router.lines import Line
from router.placement import Prompt

NOBODY = ScopeRoot(b"")

# Why a candidate is excluded.
NOT_READY = "not ready"
IS_DRAINING = "draining"
CONTEXT_LENGTH = "context length"
KV_CAPACITY = "kv capacity"
QUEUE_FULL = "queue full"
TRIED = "already tried"
NOT_ASKED = "not asked"


class WorkerState(Enum):
    """As `pando.v1.WorkerState` names them, in lower case."""

    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Ask:
    """What a reservation is asked for. `keys`: of every full block; `stores`: whether the worker will publish them.

    `owner` and `weight` are what the worker shares its queue by.
    """

    prompt: Prompt
    keys: Sequence[BlockKey]
    stores: bool = True
    avoid: frozenset[tuple[WorkerId, int]] = frozenset()  # (worker, epoch) that this request has tried
    only: WorkerId | None = None
    num_answers: int = 1  # sequences that go on from the prompt, which is computed once
    owner: ScopeRoot = NOBODY
    weight: int = 1

    def num_tokens(self, uncached: int) -> int:
        """The most that a worker may compute for it, where so much of its prompt is not cached."""
        return uncached + self.prompt.max_tokens * self.num_answers


class Queue(NamedTuple):
    """Uncached prompt tokens ahead of a new request, by two accounts, of which the greater holds.

    `reported`: by the worker, and what was sent since. `sent`: all that this router sent and saw no token of; the first
    of it, `first` tokens, is being computed since `first_since`. `others`: what the other routers say of theirs, which
    adds to it. The one account is the worker's own, the other knows what was on its way when the worker reported; each
    counts a request once.
    """

    reported: int
    sent: int
    first: int
    first_since: float
    others: int


class Standing(NamedTuple):
    """What a worker is worth to any request: the fields of a `Candidate` that do not depend on the prompt."""

    queue: Queue
    prefill_tokens_per_s: float
    step_s: float
    slot_wait_s: float
    running: int
    own_in_flight: int
    in_flight: int
    free_tokens: int
    load_share: float
    confidence: float
    excluded: str
    line: Line
