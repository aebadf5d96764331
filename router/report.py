"""What a worker's newest report says of its load, brought up to date by what this router has seen happen since.

Knows no link: whoever asks gives the report and its number. Invariant: a request is added to a report that came before
it was placed, taken from one that came after, and never both.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.link_messages import WorkerLoad


@dataclass(slots=True)
class ReportedLoad:
    """A report counts what was there when it was made; until the next one, this router's own requests go on."""

    _number: int = 0
    _new_tokens: int = 0
    _new_sequences: int = 0
    _started_tokens: int = 0
    _ended_sequences: int = 0

    def placed(self, number: int, tokens: int, sequences: int) -> None:
        """A request of so many uncached tokens was placed while `number` was the newest report."""
        self._turn(number)
        self._new_tokens += tokens
        self._new_sequences += sequences

    def started(self, number: int, placed_at: int, tokens: int) -> None:
        """Its prompt queues no more. `placed_at` is the report that was the newest when it was placed."""
        self._turn(number)
        if placed_at == number:
            self._new_tokens -= tokens
        else:
            self._started_tokens += tokens

    def ended(self, number: int, placed_at: int, sequences: int) -> None:
        """So many of its sequences ended."""
        self._turn(number)
        if placed_at == number:
            self._new_sequences -= sequences
        else:
            self._ended_sequences += sequences

    def queued_tokens(self, number: int, load: WorkerLoad) -> int:
        """Uncached prompt tokens that are not computed."""
        self._turn(number)
        return max(0, load.queued_tokens - self._started_tokens) + self._new_tokens

    def running(self, number: int, load: WorkerLoad) -> int:
        """Sequences that have a slot; those placed since the report are not known to have one."""
        self._turn(number)
        return max(0, load.running - self._ended_sequences)

    def in_flight(self, number: int, load: WorkerLoad) -> int:
        """Sequences, running and waiting."""
        self._turn(number)
        return max(0, load.running + load.waiting - self._ended_sequences) + self._new_sequences

    def promised_tokens(self, number: int) -> int:
        """What requests placed since the report, and not started, are going to write."""
        self._turn(number)
        return self._new_tokens

    def _turn(self, number: int) -> None:
        if number != self._number:
            self._number = number
            self._new_tokens = self._new_sequences = self._started_tokens = self._ended_sequences = 0
