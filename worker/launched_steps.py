"""The steps that an engine has on its way: one, and the next one launched behind it shortly before it ends.

Knows a runner and time, no sequences. Invariant: answers are read in the order of launches, and a step that could not
be launched fails in its turn.

    step N      |---------------- runs -----------------|
    engine       seal, say N-1 |  wait  | decide, launch N+1 |
                                        ^ late: whoever comes before is in N+1
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from worker.batch import Batch
from worker.runner import Runner, StepInFlight
from worker.step_rates import StepRates

logger = logging.getLogger(__name__)

LATE = 0.9
"""The next step is decided when so much of the present one is over, by forecast, and the time that deciding takes."""
LEAD_WEIGHT = 0.2
"""Of the newest in the time that deciding takes."""


@dataclass(slots=True)
class _Launched:
    batch: Batch
    step: StepInFlight
    launched_at: float


@dataclass(frozen=True, slots=True)
class EndedStep:
    """A step that ended after `seconds`; without `token_ids` it failed."""

    batch: Batch
    seconds: float
    token_ids: list[int] | None


class LaunchedSteps:
    """For the engine's thread. Without `overlap` a step runs when its end is waited for."""

    def __init__(self, runner: Runner, clock: Callable[[], float], *, overlap: bool) -> None:
        self.rates = StepRates()
        self._runner = runner
        self._clock = clock
        self._overlap = overlap
        self._steps: deque[_Launched] = deque()
        self._ended_at = float("-inf")
        self._late_at = 0.0
        self._lead_s = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    def launch(self, batch: Batch) -> None:
        """Have it run behind the others."""
        step: StepInFlight
        if not self._overlap:
            step = _Lockstep(self._runner, batch)
        else:
            try:
                step = self._runner.launch(batch)
            except Exception:  # said in its turn, when the steps before it have ended
                logger.exception("a step of %d sequences could not be launched", len(batch.sequences))
                step = _Failed()
        now = self._clock()
        if self._steps:
            self._lead_s += (now - self._late_at - self._lead_s) * (LEAD_WEIGHT if self._lead_s else 1.0)
        self._steps.append(_Launched(batch, step, now))

    def wait_until_late(self) -> bool:
        """Wait until it is time to decide the step behind the only one; False if that ended before, or if nothing is
        known of its length. Whoever comes meanwhile can still be in it."""
        if not self._overlap:
            return False
        (launched,) = self._steps
        forecast_s = self.rates.forecast_s(launched.batch)
        if not forecast_s:
            return False
        late_at = self._began(launched) + LATE * forecast_s - 2 * self._lead_s
        if launched.step.wait(late_at - self._clock()):
            return False
        self._late_at = self._clock()
        return True

    def take_oldest(self) -> EndedStep:
        """Wait for the end of the oldest one."""
        launched = self._steps.popleft()
        token_ids: list[int] | None = None
        began = self._began(launched)
        try:
            answer = launched.step.tokens()
            _check_tokens(launched.batch, answer, self._runner.spec.vocab_size)
            token_ids = answer
        except Exception:  # the containment of a step: any runner error is its sequences' error
            logger.exception("a step of %d sequences failed", len(launched.batch.sequences))
        self._ended_at = self._clock()
        seconds = self._ended_at - began
        if token_ids is not None:
            self.rates.record(launched.batch, seconds)
        return EndedStep(launched.batch, seconds, token_ids)

    def _began(self, launched: _Launched) -> float:
        return max(launched.launched_at, self._ended_at)


class _Lockstep:
    """Runs when its end is waited for, on the thread that waits."""

    def __init__(self, runner: Runner, batch: Batch) -> None:
        self._runner = runner
        self._batch = batch

    def wait(self, timeout_s: float) -> bool:
        return True

    def tokens(self) -> list[int]:
        return self._runner.execute(self._batch)


class _Failed:
    """Could not be launched."""

    def wait(self, timeout_s: float) -> bool:
        return True

    def tokens(self) -> list[int]:
        raise RuntimeError("the step was not launched")


def _check_tokens(batch: Batch, token_ids: list[int], vocab_size: int) -> None:
    wanted = sum(len(share.draws) for share in batch.sequences)
    if len(token_ids) != wanted or not all(0 <= token_id < vocab_size for token_id in token_ids):
        raise ValueError("the runner's answer does not fit its batch")
