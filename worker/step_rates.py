"""How fast this worker is at present: moving averages over the steps that it ran.

Knows batches and seconds, no clock. Invariant: a step that is not mostly prefill says nothing of the prefill rate.
"""

from __future__ import annotations

from worker.batch import Batch


class StepRates:
    """Moving averages over steps: prefill tokens a second, weighted by tokens, milliseconds a step, and what a step
    takes that decodes alone."""

    HALF_LIFE_TOKENS = 4096
    STEP_WEIGHT = 0.1
    DECODE_WEIGHT = 0.3

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._decode_s = 0.0
        self.step_ms = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """0 until a prefill has been seen."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    def forecast_s(self, batch: Batch) -> float:
        """About how long a step will take; 0 where nothing like it was seen."""
        more_tokens = batch.num_tokens - len(batch.sequences)
        if more_tokens and not self._seconds:
            return 0.0
        return self._decode_s + more_tokens * self._seconds / max(self._tokens, 1.0)

    def record(self, batch: Batch, seconds: float) -> None:
        """Count a step; only one that is mostly prefill says something of the prefill rate."""
        ms = seconds * 1e3
        self.step_ms += (ms - self.step_ms) * (self.STEP_WEIGHT if self.step_ms else 1.0)
        num_tokens = batch.num_tokens
        if num_tokens == len(batch.sequences):
            self._decode_s += (seconds - self._decode_s) * (self.DECODE_WEIGHT if self._decode_s else 1.0)
        elif num_tokens >= 2 * len(batch.sequences):
            kept = 0.5 ** (num_tokens / self.HALF_LIFE_TOKENS)
            self._tokens = self._tokens * kept + num_tokens
            self._seconds = self._seconds * kept + seconds
