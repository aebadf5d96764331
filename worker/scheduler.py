"""Decides what one step computes: which sequences, how many tokens of each, in whose blocks.

Knows no runner, thread or wire; time comes in as an argument. Running sequences are served in one fixed order, and
only a later one is ever preempted for an earlier one, so the first always gets on. Who waits for another sequence's
blocks holds none and keeps nobody behind it from running. Blocks that a step on its way may write are given to nobody.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Set
from itertools import chain, islice

from kvstore.block_pool import BlockPool
from kvstore.scope import ScopeRoot
from kvstore.tiers import Tiers
from worker.admission import Admission, SchedulerLimits
from worker.batch import Batch, ScheduledSequence
from worker.fairness import FairQueue
from worker.holdings import Holdings
from worker.sequence import Finish, Sequence, SequenceOutput, SequenceRequest, State
from worker.step_plan import StepPlan
from worker.steps_ahead import leaves_open


class Scheduler:
    """All sequences of a worker from submit to finish. Outputs collect inside until `take_outputs`."""

    def __init__(
        self,
        pool: BlockPool,
        limits: SchedulerLimits,
        *,
        holdings: Holdings | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self._pool = pool
        self._limits = limits
        self._admission = Admission(pool, limits, holdings or Holdings(pool, tiers), tiers)
        self._sequences: dict[int, Sequence] = {}
        self._queue = FairQueue()
        self._running: list[Sequence] = []  # by Sequence.order
        self._loading: dict[int, Sequence] = {}  # of the waiting: those that blocks are loaded for
        self._deadlines: list[tuple[float, int]] = []
        self._outputs: list[SequenceOutput] = []
        self._launched: list[Batch] = []  # not yet ended, the oldest first: two at most
        self._leaving: dict[int, Sequence] = {}  # ended, and with a share in one of these
        self._arrivals = 0
        self.num_preemptions = 0
        self.num_discarded_tokens = 0
        """Computed for sequences that had ended meanwhile."""
        self.draining = False

    # What the outside asks for

    def submit(self, request: SequenceRequest, now: float) -> None:
        """Queue a request, or end it as rejected when it can never fit. A full queue says who of all has to go."""
        leader, *forks = [self._make(one, now) for one in (request, *map(request.fork, request.forks))]
        reason = self._refusal(leader) or self._make_room(request)
        if reason:
            self._outputs += [sequence.end(Finish.REJECTED, reason) for sequence in (leader, *forks)]
            return
        for sequence in (leader, *forks):
            self._sequences[sequence.id] = sequence
            self._queue.enter(sequence)
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

    def cancel_owners(self, owners: Set[ScopeRoot]) -> None:
        """End all sequences of these owners."""
        for sequence in [one for one in self._sequences.values() if one.request.owner in owners]:
            self._end(sequence, sequence.end(Finish.CANCELLED, "PURGED"))

    def fail_all(self, reason: str) -> None:
        """End every sequence with an error."""
        while self._sequences:
            sequence = next(iter(self._sequences.values()))
            self._end(sequence, sequence.end(Finish.ERROR, reason))

    def abandon(self, reason: str) -> None:
        """As `fail_all`, without giving blocks back: for a pool that is broken."""
        self._outputs += [sequence.end(Finish.ERROR, reason) for sequence in self._sequences.values()]
        for collection in (self._sequences, self._queue, self._running, self._deadlines, self._launched, self._leaving):
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
        return len(self._queue)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait to be computed before their sequences can go on: not the one of a decode, and not those that
        another sequence computes already."""
        return sum(
            max(s.num_uncomputed_tokens - 1 - (s.wait.num_tokens if s.wait is not None else 0), 0)
            for s in self._sequences.values()
            if s.origin is None
        )

    # One step

    def schedule(self, now: float) -> Batch | None:
        """The next step, or None when there is nothing to compute. `complete` or `fail` comes for each, in order.

        There are no prefill and decode phases: each running sequence has tokens and computed tokens, and a step lets
        the computed ones catch up under the token budget. A prompt is many tokens behind, a decoding sequence one, a
        prefix hit or a resumed sequence somewhere between. While a step has not ended, the one behind it may be decided
        already, with tokens that are not known yet; None then also where its end has to be waited for.
        """
        self._expire(now)
        step = StepPlan(self._limits.max_batch_tokens)
        if self._launched:
            if not self._may_go_ahead() or not self._go_on(step):
                return None
            is_calm = True
        else:
            is_calm = self._go_on_at_any_price(step)
        if step.is_empty or (step.budget and is_calm):
            for sequence in self._admissions(now):
                step.add(sequence)
                if not step.budget:
                    break
        batch = step.batch()
        if batch is not None:
            self._launched.append(batch)
        return batch

    def complete(self, batch: Batch, token_ids: list[int]) -> None:
        """Take over a step that ran: computed tokens, full blocks, one sampled token for each share that has one."""
        self._launched.pop(self._launched.index(batch))
        answer = iter(token_ids)
        for share in batch.sequences:
            sampled = dict(zip((share.sequence_id, *share.fork_ids), islice(answer, len(share.draws)), strict=False))
            sequence = self._sequences.get(share.sequence_id)
            if sequence is None:
                self._discard(share)
                continue
            sequence.ended(len(share.token_ids), drawn=bool(share.draws))
            table = sequence.blocks
            if sequence.unsettled:
                table.copies_done()
            sequence.unsettled = table.seal(sequence.token_ids, sequence.num_computed_tokens)
            self._admission.leave_window(sequence)
            if share.sampling is not None:
                self._queue.serve(sequence, generated_tokens=1 + len(sequence.forks))
                for one in (sequence, *self._fork(sequence)):
                    self._emit(one, one.append(sampled[one.id]))

    def fail(self, batch: Batch, reason: str) -> None:
        """End the sequences of a step that did not run; all others go on."""
        self._launched.pop(self._launched.index(batch))
        for share in batch.sequences:
            sequence = self._sequences.get(share.sequence_id)
            if sequence is None:
                self._discard(share)
            else:
                sequence.ended(len(share.token_ids), drawn=bool(share.draws))
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
        self._queue.add(leader)

    def _refusal(self, sequence: Sequence) -> str:
        if self.draining:
            return "DRAINING"
        limits, size = self._limits, self._pool.block_size
        if sequence.max_num_tokens > limits.max_model_len:
            return "CONTEXT_LENGTH"
        # The last token is never computed, so it needs no slot.
        num_held = limits.num_held(sequence.max_num_tokens - 1, size)
        if -(-num_held // size) > self._pool.num_blocks:
            return "KV_CAPACITY"
        return ""

    def _make_room(self, newcomer: SequenceRequest) -> str:
        """Why there is no place in the queue, empty if there is one now."""
        if len(self._queue) < self._limits.max_waiting:
            return ""
        leader = self._queue.gives_way(newcomer)
        if leader is None:
            return "QUEUE_FULL"
        for sequence in (*leader.forks, leader):
            self._end(sequence, sequence.end(Finish.REJECTED, "QUEUE_FULL"))
        return ""

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = self._sequences[self._deadlines[0][1]]
            self._end(sequence, sequence.end(Finish.DEADLINE))

    # Running

    def _may_go_ahead(self) -> bool:
        """Whether the step behind one on its way can be decided now, at no cost to anybody who waits."""
        if len(self._launched) > 1 or not self._running:
            return False
        return not leaves_open(self._launched[-1], self._sequences, somebody_waits=bool(self._queue))

    def _go_on(self, step: StepPlan) -> bool:
        """A share for each that runs on; False, with nothing changed, where blocks are missing: who has to give way is
        known when the step on its way has ended."""
        for sequence in self._running:
            if step.budget and not sequence.is_decided:
                if not self._take_blocks(sequence, step):
                    return False
                step.add(sequence)
        return True

    def _go_on_at_any_price(self, step: StepPlan) -> bool:
        """A share for each that runs and gets blocks; whether nobody had to give way."""
        preempted, index = self.num_preemptions, 0
        while step.budget and index < len(self._running):
            sequence = self._running[index]
            if self._grow(sequence, step):
                step.add(sequence)
                index += 1
        return self.num_preemptions == preempted

    def _take_blocks(self, sequence: Sequence, step: StepPlan) -> bool:
        """Blocks for all its tokens, and those of its share its own to write; False if there are too few."""
        table, end = sequence.blocks, step.end_of(sequence)
        if not table.reserve(self._admission.reach(sequence, end)):
            return False
        return not sequence.unsettled or table.prepare_write(sequence.next_position, end)

    def _grow(self, sequence: Sequence, step: StepPlan) -> bool:
        """Blocks for its share; the last ones give theirs up if need be. False: it had to give up its own."""
        while not self._take_blocks(sequence, step):
            victim = next(
                one for one in reversed(self._running) if one is sequence or self._admission.is_over_floor(one)
            )
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its place in the queue; its full blocks stay cached, so coming back costs what is left of them."""
        _remove(self._running, sequence)
        sequence.release()
        sequence.state = State.WAITING
        self._queue.add(sequence)
        self.num_preemptions += 1

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Let those go that waited for this prompt, over the same blocks; what is too many to run goes to the queue."""
        forks, sequence.forks = sequence.forks, []
        sequence.unsettled |= bool(forks)
        for fork in forks:
            fork.follow(sequence)
            if len(self._running) < self._limits.max_sequences:
                fork.table = sequence.blocks.fork(sequence.num_computed_tokens)
                fork.unsettled = True
                fork.num_computed_tokens = sequence.num_computed_tokens
                fork.state = State.RUNNING
                insort(self._running, fork, key=_order)
            else:
                self._queue.add(fork)
        return forks

    # Waiting -> running

    def _admissions(self, now: float) -> Iterator[Sequence]:
        """Admit from the queue, in its order, what gets blocks for all its tokens, so that it can finish its prompt.

        Those that wait for another sequence are passed by, and those that find they have to. First go those whose load
        is done: what they hold they use or give up, so that nobody who runs is short of it for long. Behind one that
        does not fit go only those that take what is their own.
        """
        blocked = False
        self._loading = {one.id: one for one in self._loading.values() if one.load is not None}
        loaded = [one for one in self._loading.values() if not one.must_wait()]
        loading = len(self._loading) - len(loaded)
        for sequence in chain(loaded, self._queue):
            if len(self._running) + loading >= self._limits.max_sequences:
                return
            holds, is_new = sequence.load is not None, sequence.admission is None
            if sequence.must_wait():
                continue
            if blocked and not holds and not self._admission.is_within_floor(sequence):
                continue
            if self._admission.attach(sequence, now, self._running):
                self._queue.remove(sequence)
                if is_new:
                    self._queue.serve(sequence, prompt_tokens=sequence.num_uncomputed_tokens)
                sequence.state = State.RUNNING
                insort(self._running, sequence, key=_order)
                yield sequence
            elif sequence.load is not None:
                self._loading[sequence.id] = sequence
                loading += 1
            elif sequence.must_wait() or holds:
                continue
            elif self._admission.is_strict:
                return
            else:
                blocked = True

    # Ends

    def _emit(self, sequence: Sequence, output: SequenceOutput) -> None:
        if output.finish is None:
            self._outputs.append(output)
        else:
            self._end(sequence, output)

    def _end(self, sequence: Sequence, output: SequenceOutput) -> None:
        """The one way out: blocks released, every list left, the last output said. Blocks that a step on its way may
        write are released when that has ended."""
        if sequence.num_launched_tokens:
            self._leaving[sequence.id] = sequence
        else:
            sequence.release()
        if sequence.state is State.RUNNING:
            _remove(self._running, sequence)
        else:
            self._queue.remove(sequence)
        self._queue.leave(sequence)
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

    def _discard(self, share: ScheduledSequence) -> None:
        """A step has ended that computed something for a sequence which is no more."""
        sequence = self._leaving[share.sequence_id]
        sequence.ended(len(share.token_ids), drawn=bool(share.draws))
        self.num_discarded_tokens += len(share.token_ids)
        if not sequence.num_launched_tokens:
            del self._leaving[sequence.id]
            sequence.release()

    def _pass_on(self, forks: list[Sequence], output: SequenceOutput) -> None:
        """Whoever computed the prompt for these has ended: another one does, unless it cannot be computed."""
        if output.finish is Finish.ERROR:
            for fork in forks.copy():
                self._end(fork, fork.end(Finish.ERROR, output.reason))
        else:
            self._lead(forks[0], forks[1:])


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _remove(ordered: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(ordered, sequence.order, key=_order)
    if index < len(ordered) and ordered[index] is sequence:
        del ordered[index]
