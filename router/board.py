"""The members' standings as columns, kept up as they change: a decision reads them and builds nothing for each worker.

Knows no link and no lease but through `Member`. Invariant: `decide` is `place` over `candidates`, which are built anew
from the members; tests ask both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from kvstore.block import BlockKey, WorkerId
from kvstore.index import CachedPrefix
from router.columns import Columns, Held
from router.computing import Heads
from router.cost import cost
from router.ghost import Ghost
from router.lines import Lines, ahead, owner_of
from router.member import FirstOutput, Member
from router.peers import Loads, PeerLoads, SentLoad
from router.placement import NO_WORKER, Candidate, Placement, Policy, PullRates, choose
from router.plans import Pull
from router.pulls import Givers, PullMeter
from router.rates import LengthRates, Meters, seconds_per_token
from router.standing import QUEUE_FULL, Ask, Standing

MOST_UTILIZATION = 0.95
CLEAN = 0.1
"""Of a time to first token that was for less than this share waiting, the rest says how fast the worker computes."""
LEAST_TOKENS = 64
LEAST_RATE = 1e-3
RATE_DIGITS = 3
"""Slower arrivals than one in a quarter of an hour are not told to other routers, and none with more digits."""
RATE_NEWS = 0.02
"""A reported rate that moved by less than this share moves nothing."""

Found = Mapping[WorkerId, CachedPrefix]
_device_blocks = attrgetter("device_blocks")
_num_blocks = attrgetter("num_blocks")


class Board:
    """For one event loop."""

    def __init__(self, block_size: int, now: float) -> None:
        self.heads = Heads()
        self.peers = PeerLoads()
        self.lengths = LengthRates()
        self.ghost = Ghost()
        self.pulls = PullMeter()
        self._block_size = block_size
        self._members: list[Member] = []
        self._joined: Mapping[WorkerId, Member] | None = None
        self._row_of: dict[WorkerId, int] = {}
        self._changed: set[Member] = set()
        self._arrivals, self._work = Meters(0, now), Meters(0, now)
        self._rates = np.zeros(0)
        self._lay_out([])

    def set_members(self, members: Mapping[WorkerId, Member]) -> None:
        """These are all there are now. Looked at when they are next asked for, so that many may come one by one."""
        self._joined = members

    def touch(self, member: Member) -> None:
        """Its standing may have changed."""
        self._changed.add(member)

    def decide(self, ask: Ask, found: Found, now: float, by: tuple[Policy, int] = ("cost", 0)) -> Placement:
        """Where a request goes; `found` is what the index has of its keys. Nothing is counted yet."""
        self._catch_up(now)
        out, reasons = self._excluded(ask)
        prompt = ask.prompt
        if len(reasons) == len(self._members):
            return Placement(None, NO_WORKER, 0, prompt.num_tokens, reasons, num_tokens=prompt.num_tokens)
        held = self._held(ask, found, now)
        costs = cost(prompt, self._rows, held, out if reasons else None)
        return choose(prompt, self._rows, costs, (out, reasons) if reasons else None, by)

    def candidates(self, ask: Ask, found: Found, now: float) -> list[Candidate]:
        """Each member as a value, built anew: what `decide` does not have to do."""
        self._catch_up(now)
        most = (ask.prompt.num_tokens - 1) // self._block_size
        return [self._candidate(member, ask, found.get(member.id), most) for member in self._members]

    def placed(self, placement: Placement, keys: Sequence[BlockKey], now: float) -> None:
        """A request goes where `decide` said; `keys` are those that the worker will have then."""
        if placement.chosen is None or (row := self._row_of.get(placement.chosen.worker)) is None:
            return
        worker = placement.chosen.worker
        self.peers.unheard.decide()
        self._arrivals.add(row, 1.0, now)
        self._work.add(row, placement.uncached_tokens * float(self._rows.s_per_token[row]), now)
        if keys and self._members[row].lease.reuse:
            self.ghost.placed(worker, keys, now)

    @property
    def can_pull(self) -> bool:
        """Whether there are workers that can give blocks to each other."""
        self._settle()
        formats = [member.payload_format for member in self._members if member.payload_format]
        return len(set(formats)) < len(formats)

    def pull_rates(self, now: float) -> PullRates:
        """What blocks of another worker cost at present."""
        self._settle()
        token_s = self._rows.s_per_token
        return self.pulls.rates(float(token_s.max()) if len(token_s) else 0.0, now)

    def learn(self, member: Member, first: FirstOutput, now: float) -> None:
        """Compare what was predicted of a request with what its first output says."""
        self._settle()
        terms, admission = first.placement.chosen, first.admission
        row = self._row_of.get(member.id)
        if terms is None or row is None or self._members[row] is not member:
            return
        if terms.pull is not None:
            self._learn_pull(terms.pull, first, now)
        elif terms.cached_tokens:
            member.confidence.add(min(1.0, admission.cached_tokens / terms.cached_tokens))
        waited_s = terms.queue_s + terms.slot_s + terms.step_s
        computed = first.placement.num_tokens - admission.cached_tokens
        own_s = first.seconds - waited_s
        if terms.pull is not None or waited_s > CLEAN * first.seconds or own_s <= 0 or computed <= 0:
            return
        if self.peers.at(member.id, member.lease.epoch).waiting:
            return  # it may have waited for theirs
        average_s = computed * float(self._rows.s_per_token[row])
        if not admission.cached_cpu and computed >= LEAST_TOKENS:
            self.lengths.learn(first.placement.num_tokens, own_s, average_s)
        elif admission.cached_cpu >= LEAST_TOKENS:
            load_s = max(0.0, own_s - average_s * self.lengths.factor(first.placement.num_tokens))
            member.load_share.add(load_s / admission.cached_cpu / float(self._rows.s_per_token[row]))

    def _learn_pull(self, pull: Pull, first: FirstOutput, now: float) -> None:
        """A pull that was found to be needless, or that another request's made so, says nothing."""
        admission = first.admission
        if not admission.pull_s:
            return
        asked = pull.num_tokens - (admission.cached_device + admission.cached_cpu)
        if first.source is not None and asked > 0:
            first.source.giver.gave(min(1.0, admission.pulled_tokens / asked), now)
            self.touch(first.source)
        if not admission.peer_lacks:
            self.pulls.add(admission.pulled_tokens * (1.0 + pull.others), admission.pull_s, now)

    def sent(self, now: float) -> Loads:
        """What this router sent to each worker, for the other routers."""
        self._settle()
        arrivals, work = self._arrivals.per_second(now).tolist(), self._work.per_second(now).tolist()
        s_per_token = self._rows.s_per_token
        return {
            member.id: SentLoad(
                member.lease.epoch,
                member.sent_tokens(now, float(s_per_token[row])) if member.num_open else 0,
                member.num_open,
                member.marks(),
                round(arrivals[row], RATE_DIGITS),
                round(work[row], RATE_DIGITS),
                member.num_waiting,
                member.fresh_tokens(now),
                tuple((owner, *waiting) for owner, waiting in member.crowd.line.items()),
            )
            for row, member in enumerate(self._members)
            if member.num_open or arrivals[row] > LEAST_RATE
        }

    # Columns

    def _settle(self) -> None:
        if self._joined is not None:
            members, self._joined = self._joined, None
            self._lay_out(sorted(members.values(), key=attrgetter("id")))

    def _lay_out(self, members: list[Member]) -> None:
        # Another life of a worker is another member.
        row_of = {member: row for row, member in enumerate(self._members)}
        before = [row_of.pop(member, None) for member in members]
        self._arrivals, self._work = self._arrivals.moved(before), self._work.moved(before)
        for member in row_of:
            self.ghost.drop(member.id)
        for member in members:
            self.ghost.resize(member.id, member.lease.device_blocks)
        self._members = members
        self._row_of = {member.id: row for row, member in enumerate(members)}
        self._rows = Columns.of([member.id for member in members])
        rates = [0.0 if row is None else float(self._rates[row]) for row in before]
        self._reported, self._sent, self._first, self._first_since, self._others_queued = np.zeros((5, len(members)))
        self._rates = np.array(rates)
        others = [self.peers.at(member.id, member.lease.epoch) for member in members]
        self._others_arrivals = np.array([each.arrivals_per_s for each in others], float)
        self._others_work = np.array([each.utilization for each in others], float)
        self._rows.s_per_token = seconds_per_token(self._rates)
        self._givers = Givers(len(members))
        self._lines = Lines(len(members))
        self._standing_reasons = [""] * len(members)
        self._any_full = False
        self._changed = set(members)
        self._rates_changed = self._reasons_changed = True
        self._shortest = min((member.lease.max_model_len for member in members), default=0)
        self._smallest = min((member.num_slots for member in members), default=0)

    def _catch_up(self, now: float) -> None:
        """Write what changed since the last decision, and what time changes."""
        self._settle()
        self.heads.expire(now)
        rows = self._rows
        for worker, epoch in self.peers.news():
            self._hear(worker, epoch)
        if self._changed:
            for member in self._changed:
                row = self._row_of.get(member.id)
                if row is not None and self._members[row] is member:
                    self._write(row, member, member.standing(), now)
            self._changed.clear()
            if self._rates_changed:
                self._rates_changed = False
                rows.s_per_token = seconds_per_token(self._rates)
            if self._reasons_changed:
                self._reasons_changed = False
                self._out = np.array([bool(reason) for reason in self._standing_reasons], bool)
                named = zip(rows.workers, self._standing_reasons, strict=True)
                self._reasons = tuple((worker, reason) for worker, reason in named if reason)
                self._any_full = QUEUE_FULL in self._standing_reasons
        done = np.maximum(now - self._first_since, 0.0) / rows.s_per_token
        rows.queued = np.maximum(self._reported, self._sent - np.minimum(done, self._first) + self._others_queued)
        rows.others = self.peers.unheard.others
        rows.arrivals_per_s = self._arrivals.per_second(now) + self._others_arrivals
        rows.utilization = np.minimum(self._work.per_second(now) + self._others_work, MOST_UTILIZATION)

    def _hear(self, worker: WorkerId, epoch: int) -> None:
        """Other routers have something else at a worker than they had."""
        row = self._row_of.get(worker)
        if row is not None and (member := self._members[row]).lease.epoch == epoch:
            others = self.peers.at(worker, epoch)
            self._others_arrivals[row], self._others_work[row] = others.arrivals_per_s, others.utilization
            self._changed.add(member)

    def _write(self, row: int, member: Member, standing: Standing, now: float) -> None:
        rows = self._rows
        queue = standing.queue
        self._reported[row], self._sent[row] = queue.reported, queue.sent
        self._first[row], self._first_since[row] = queue.first, queue.first_since
        self._others_queued[row] = queue.others
        self._lines.write(row, standing.line)
        rows.step_s[row] = standing.step_s
        rows.slot_s[row] = standing.slot_wait_s
        rows.running[row] = standing.running
        rows.free_tokens[row] = standing.free_tokens
        rows.load_share[row] = standing.load_share
        rows.confidence[row] = standing.confidence
        rows.reuse[row] = self.ghost.reuse(member.id, now)
        self._givers.write(row, member.payload_format, member.giver.under_way, member.giver.share(now))
        if abs(self._rates[row] - standing.prefill_tokens_per_s) > RATE_NEWS * standing.prefill_tokens_per_s:
            self._rates[row] = standing.prefill_tokens_per_s
            self._rates_changed = True
        if self._standing_reasons[row] != standing.excluded:
            self._standing_reasons[row] = standing.excluded
            self._reasons_changed = True

    def _excluded(self, ask: Ask) -> tuple[NDArray[np.bool_], tuple[tuple[WorkerId, str], ...]]:
        """Who cannot take the request; known beforehand where it asks for nothing special and no queue is full."""
        prompt = ask.prompt
        fits = prompt.num_tokens + prompt.max_tokens <= self._shortest and prompt.num_positions <= self._smallest
        if fits and ask.only is None and not ask.avoid and not self._any_full:
            return self._out, self._reasons
        standing = zip(self._members, self._standing_reasons, strict=True)
        words = [member.refusal(ask, reason) for member, reason in standing]
        named = tuple((member.id, word) for member, word in zip(self._members, words, strict=True) if word)
        return np.array([bool(word) for word in words]), named

    def _held(self, ask: Ask, found: Found, now: float) -> Held:
        """What workers have of the prompt. At least its last token is computed."""
        size, block_size = len(self._members), self._block_size
        most = (ask.prompt.num_tokens - 1) // block_size
        device = np.zeros(size + 1)  # the last one for workers of the index that are no members
        tiers = None
        if found:
            rows = [self._row_of.get(worker, size) for worker in found]
            on_device = list(map(_device_blocks, found.values()))
            device[rows] = on_device
            either = list(map(_num_blocks, found.values()))
            if either != on_device:
                tiers = np.zeros(size + 1)
                tiers[rows] = either
        device = np.minimum(device[:size], most)
        computing = self._computing(ask.keys, device, most)
        return Held(
            device * block_size,
            None if tiers is None else np.minimum(tiers[:size], most) * block_size,
            None if computing is None else computing * block_size,
            self._givers.sources(self.pull_rates(now)) if found and self._givers.can_give else None,
            self.lengths.factor(ask.prompt.num_tokens),
            self._ahead(ask, device),
        )

    def _ahead(self, ask: Ask, device: NDArray[np.float64]) -> NDArray[np.float64] | None:
        owner = owner_of(ask.owner)
        if not self._lines.has_others(owner):
            return None
        num_tokens = ask.num_tokens(ask.prompt.num_tokens) - device * self._block_size
        return self._lines.ahead(owner, ask.weight, num_tokens)

    def _computing(
        self, keys: Sequence[BlockKey], device: NDArray[np.float64], most: int
    ) -> NDArray[np.float64] | None:
        at_work, others = self.heads.of(keys), self.peers.computing(keys)
        if not at_work and not others:
            return None
        row_of, members = self._row_of, self._members
        on_device = list(map(int, device.tolist()))
        depths: dict[int, int] = {}
        for (worker, epoch), blocks in others.items():
            row = row_of.get(worker)
            if row is not None and members[row].lease.epoch == epoch and min(blocks, most) > on_device[row]:
                depths[row] = min(blocks, most)
        for computing in at_work:
            row = row_of.get(computing.worker)
            if row is None or members[row].computing is not computing:
                continue  # of a life that is over
            depth = computing.depth(keys, on_device[row], most)
            if depth > depths.get(row, on_device[row]):
                depths[row] = depth
        if not depths:
            return None
        credited = device.copy()
        credited[list(depths)] = list(depths.values())
        return credited

    def _candidate(self, member: Member, ask: Ask, held: CachedPrefix | None, most: int) -> Candidate:
        standing, row = member.standing(), self._row_of[member.id]
        others = self.peers.computing(ask.keys).get((member.id, member.lease.epoch), 0)
        blocks = min(held.device_blocks, most) if held is not None else 0
        return Candidate(
            worker=member.id,
            cached_tokens=blocks * self._block_size,
            queued_tokens=float(self._rows.queued[row]),
            prefill_tokens_per_s=float(self._rates[row]),
            step_s=standing.step_s,
            slot_wait_s=standing.slot_wait_s,
            excluded=member.refusal(ask, standing.excluded),
            tier_tokens=min(held.num_blocks, most) * self._block_size if held is not None else 0,
            computing_tokens=max(member.computing.depth(ask.keys, blocks, most), min(others, most)) * self._block_size,
            running=standing.running,
            free_tokens=standing.free_tokens,
            reuse=float(self._rows.reuse[row]),
            load_share=standing.load_share,
            confidence=standing.confidence,
            arrivals_per_s=float(self._rows.arrivals_per_s[row]),
            utilization=float(self._rows.utilization[row]),
            payload_format=member.payload_format,
            pulls=member.giver.under_way,
            pull_share=self._givers.share(row),
            ahead=ahead(
                standing.line,
                owner_of(ask.owner),
                ask.weight,
                ask.num_tokens(ask.prompt.num_tokens) - blocks * self._block_size,
            ),
        )
