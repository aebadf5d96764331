"""Decides what one step computes: which sequences, how many tokens of each, in whose blocks.

Knows no runner, thread or wire; time comes in as an argument. Running sequences are served in one fixed order, and
only a later one is ever preempted for an earlier one, so the first always gets on. Who waits for another sequence's
blocks holds none and keeps nobody behind it from running.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from worker.batch import Batch, BlockCopy, ScheduledSequence
from worker.sequence import AdmissionFacts, Finish, Sequence, SequenceOutput, SequenceRequest, State


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """`max_batch_tokens` is the token budget of a step."""

    max_batch_tokens: int
    max_sequences: int
    max_waiting: int
    max_model_len: int


class Scheduler:
    """All sequences of a worker from submit to finish. Outputs collect inside until `take_outputs`."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._limits = limits
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []  # by Sequence.order, as is _running
        self._running: list[Sequence] = []
        self._deadlines: list[tuple[float, int]] = []
        self._outputs: list[SequenceOutput] = []
        self._arrivals = 0
        self._blocked: tuple[int, int] | None = None  # head of the queue and the blocks there were when it did not fit
        self.num_preemptions = 0
        self.draining = False

    # What the outside asks for

    def submit(self, request: SequenceRequest, now: float) -> None:
        """Queue a request, or end it as rejected when it can never fit or the queue is full."""
        leader, *forks = [self._make(one, now) for one in (request, *map(request.fork, request.forks))]
        reason = self._refusal(leader)
        if reason:
            self._outputs += [sequence.end(Finish.REJECTED, reason) for sequence in (leader, *forks)]
            return
        for sequence in (leader, *forks):
            self._sequences[sequence.id] = sequence
            if request.deadline is not None:
                insort(self._deadlines, (request.deadline, sequence.id))
        if len(leader.token_ids) >= leader.max_num_tokens:
            for sequence in (leader, *forks):
                self._end(sequence, sequence.end(Finish.LENGTH))
        else:
            self._lead(leader, forks)

    def cancel(self, sequence_id: int) -> None:
        """End a sequence at once, its blocks with it; one that is not known has ended already."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._end(sequence, sequence.end(Finish.CANCELLED))

    def fail_all(self, reason: str) -> None:
        """End every sequence with an error."""
        while self._sequences:
            sequence = next(iter(self._sequences.values()))
            self._end(sequence, sequence.end(Finish.ERROR, reason))

    def abandon(self, reason: str) -> None:
        """As `fail_all`, without giving blocks back: for a pool that is broken."""
        self._outputs += [sequence.end(Finish.ERROR, reason) for sequence in self._sequences.values()]
        for collection in (self._sequences, self._waiting, self._running, self._deadlines):
            collection.clear()

    def take_outputs(self) -> list[SequenceOutput]:
        """Outputs since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait to be computed before their sequences can go on, the one of a decode left out."""
        return sum(max(s.num_uncomputed_tokens - 1, 0) for s in self._sequences.values() if s.origin is None)

    # One step

    def schedule(self, now: float) -> Batch | None:
        """The next step, or None when there is nothing to compute.

        There are no prefill and decode phases: each running sequence has tokens and computed tokens, and a step lets
        the computed ones catch up under the token budget. A prompt is many tokens behind, a decoding sequence one, a
        prefix hit or a resumed sequence somewhere between.
        """
        self._expire(now)
        preempted = self.num_preemptions
        step = _Step(self._limits.max_batch_tokens)
        index = 0
        while step.budget and index < len(self._running) and self._grow(self._running[index], step):
            step.add(self._running[index])
            index += 1
        if step.budget and self.num_preemptions == preempted:
            for sequence in self._admissions(now):
                step.add(sequence)
                if not step.budget:
                    break
        return step.batch()

    def complete(self, batch: Batch, token_ids: list[int]) -> None:
        """Take over a step that ran: computed tokens, full blocks, one sampled token for each share that has one."""
        sampled = iter(token_ids)
        for share in batch.sequences:
            sequence = self._sequences[share.sequence_id]
            sequence.num_computed_tokens += len(share.token_ids)
            table = _table(sequence)
            table.copies_done()
            table.seal(sequence.token_ids, sequence.num_computed_tokens)
            if share.sampling is not None:
                for one in (sequence, *self._fork(sequence)):
                    self._emit(one, one.append(next(sampled)))

    def fail(self, batch: Batch, reason: str) -> None:
        """End the sequences of a step that did not run; all others go on."""
        for share in batch.sequences:
            sequence = self._sequences[share.sequence_id]
            self._end(sequence, sequence.end(Finish.ERROR, reason))

    # Before the queue

    def _make(self, request: SequenceRequest, now: float) -> Sequence:
        self._arrivals += 1
        return Sequence(request, arrival=self._arrivals, now=now)

    def _lead(self, leader: Sequence, forks: list[Sequence]) -> None:
        """Queue a sequence that computes the prompt for its forks too."""
        leader.origin = None
        leader.forks = forks
        for fork in forks:
            fork.origin = leader
        insort(self._waiting, leader, key=_order)

    def _refusal(self, sequence: Sequence) -> str:
        if self.draining:
            return "DRAINING"
        if sequence.max_num_tokens > self._limits.max_model_len:
            return "CONTEXT_LENGTH"
        # The last token is never computed, so it needs no slot.
        if -(-(sequence.max_num_tokens - 1) // self._pool.block_size) > self._pool.num_blocks:
            return "KV_CAPACITY"
        if len(self._waiting) >= self._limits.max_waiting:
            return "QUEUE_FULL"
        return ""

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = self._sequences[self._deadlines[0][1]]
            self._end(sequence, sequence.end(Finish.DEADLINE))

    # Running

    def _grow(self, sequence: Sequence, step: _Step) -> bool:
        """Blocks for all its tokens, and those of its share its own to write; the last ones give theirs up if need be.

        False: it had to give up its own.
        """
        table, end = _table(sequence), step.end_of(sequence)
        while not (table.reserve(len(sequence.token_ids)) and table.prepare_write(sequence.num_computed_tokens, end)):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its place in the queue; its full blocks stay cached, so coming back costs what is left of them."""
        self._running.pop()
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.state = State.WAITING
        insort(self._waiting, sequence, key=_order)
        self.num_preemptions += 1

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Let those go that waited for this prompt, over the same blocks; what is too many to run goes to the queue."""
        forks, sequence.forks = sequence.forks, []
        for fork in forks:
            fork.follow(sequence)
            if len(self._running) < self._limits.max_sequences:
                fork.table = _table(sequence).fork(sequence.num_computed_tokens)
                fork.num_computed_tokens = sequence.num_computed_tokens
                fork.state = State.RUNNING
                insort(self._running, fork, key=_order)
            else:
                insort(self._waiting, fork, key=_order)
        return forks

    # Waiting -> running

    def _admissions(self, now: float) -> Iterator[Sequence]:
        """Admit from the queue, in order, what gets blocks for all its tokens, so that it can finish its prompt.

        Those that wait for another sequence are passed by, and those that find they have to.
        """
        for sequence in self._waiting.copy():
            if len(self._running) >= self._limits.max_sequences or self._still_blocked(sequence):
                return
            if sequence.wait is not None and not sequence.wait.ready:
                continue
            if self._attach(sequence, now):
                self._admit(sequence)
                yield sequence
            elif sequence.wait is None:
                return

    def _admit(self, sequence: Sequence) -> None:
        self._blocked = None
        _remove(self._waiting, sequence)
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_order)

    def _still_blocked(self, sequence: Sequence) -> bool:
        if self._blocked is None or self._blocked[0] != sequence.id:
            return False
        return self._pool.num_available <= self._blocked[1]

    def _attach(self, sequence: Sequence, now: float) -> bool:
        """Find the cached prefix and take blocks for the rest. On False nothing is held: with `wait`, because another
        sequence is at what comes next, else because there are too few blocks."""
        table = BlockTable(self._pool, sequence.request.regions, no_store=sequence.request.no_store)
        cached = table.attach_prefix(sequence.token_ids, len(sequence.token_ids) - 1)
        sequence.wait = table.pending
        if sequence.wait is not None or not table.reserve(len(sequence.token_ids)):
            table.release()
            if sequence.wait is None:
                self._blocked = (sequence.id, self._pool.num_available)
            return False
        sequence.table = table
        sequence.num_computed_tokens = cached
        if sequence.admission is None:
            copied = int(cached % self._pool.block_size > 0)
            sequence.admission = AdmissionFacts(cached, table.cached_published, now - sequence.queued_at, copied)
        return True

    # Ends

    def _emit(self, sequence: Sequence, output: SequenceOutput) -> None:
        if output.finish is None:
            self._outputs.append(output)
        else:
            self._end(sequence, output)

    def _end(self, sequence: Sequence, output: SequenceOutput) -> None:
        """The one way out: blocks released, every list left, the last output said."""
        self._release(sequence)
        _remove(self._running if sequence.state is State.RUNNING else self._waiting, sequence)
        if sequence.request.deadline is not None:
            entry = (sequence.request.deadline, sequence.id)
            del self._deadlines[bisect_left(self._deadlines, entry)]
        sequence.state = State.FINISHED
        del self._sequences[sequence.id]
        self._outputs.append(output)
        if sequence.origin is not None:
            sequence.origin.forks.remove(sequence)
        if sequence.forks:
            self._pass_on(sequence.forks, output)

    def _pass_on(self, forks: list[Sequence], output: SequenceOutput) -> None:
        """Whoever computed the prompt for these has ended: another one does, unless it cannot be computed."""
        if output.finish is Finish.ERROR:
            for fork in forks.copy():
                self._end(fork, fork.end(Finish.ERROR, output.reason))
        else:
            self._lead(forks[0], forks[1:])

    def _release(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            sequence.table.release()
            sequence.table = None


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _remove(ordered: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(ordered, sequence.order, key=_order)
    if index < len(ordered) and ordered[index] is sequence:
        del ordered[index]


def _table(sequence: Sequence) -> BlockTable:
    assert sequence.table is not None, "a running sequence has a block table"
    return sequence.table


class _Step:
    """A batch in the making: shares under a budget of tokens, and the copies that come before them."""

    __slots__ = ("_copies", "_shares", "budget")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._shares: list[ScheduledSequence] = []
        self._copies: list[BlockCopy] = []

    def end_of(self, sequence: Sequence) -> int:
        """Where the sequence's share of what is left of the budget ends."""
        return min(sequence.num_computed_tokens + self.budget, len(sequence.token_ids))

    def add(self, sequence: Sequence) -> None:
        """Give the sequence its share."""
        start, end = sequence.num_computed_tokens, self.end_of(sequence)
        table, last = _table(sequence), end == len(sequence.token_ids)
        self.budget -= end - start
        self._copies += [BlockCopy(*order) for order in table.take_copies()]
        self._shares.append(
            ScheduledSequence(
                sequence_id=sequence.id,
                token_ids=sequence.token_ids[start:end],
                start=start,
                block_ids=table.block_ids,
                sampling=sequence.request.sampling if last else None,
                banned_token_ids=sequence.banned_token_ids if last else (),
                fork_sampling=tuple(fork.request.sampling for fork in sequence.forks) if last else (),
            )
        )

    def batch(self) -> Batch | None:
        """The batch, if there is anything in it."""
        return Batch(tuple(self._shares), tuple(self._copies)) if self._shares else None
