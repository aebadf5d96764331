"""What a client is told where the fleet says no: one error for each reason, with when to try again.

Knows reasons, no request. Invariant: what another try could change says after how long, what it could not does not.
"""

from __future__ import annotations

from pando.errors import DeadlineExceeded, InvalidRequest, ResourceExhausted, Unavailable
from router.placement import Placement
from router.standing import CONTEXT_LENGTH, KV_CAPACITY, QUEUE_FULL, TRIED

RETRY_AFTER_S = 1.0


def raise_if_hopeless(placement: Placement) -> None:
    """Waiting for a worker helps only where none that is ready has said no."""
    if placement.retry_after_s:
        raise ResourceExhausted(
            "no worker could start it in the tenant's time", reason="TTFT", retry_after_s=placement.retry_after_s
        )
    reasons = {reason for _, reason in placement.excluded}
    if reasons & {QUEUE_FULL, TRIED}:
        raise queues_full()
    for reason in (KV_CAPACITY, CONTEXT_LENGTH):
        if reason in reasons:
            raise too_long(reason.upper().replace(" ", "_"))


def deadline_exceeded() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the answer was complete")


def queues_full() -> ResourceExhausted:
    return ResourceExhausted("every worker's queue is full", reason="QUEUE_FULL", retry_after_s=RETRY_AFTER_S)


def too_long(reason: str) -> InvalidRequest:
    if reason == "CONTEXT_LENGTH":
        return InvalidRequest("prompt and max_tokens are over the model's context", reason=reason)
    return InvalidRequest("no worker has enough KV blocks for prompt and max_tokens", reason=reason)


def no_worker() -> Unavailable:
    return Unavailable("no worker is ready", reason="NO_WORKER", retry_after_s=RETRY_AFTER_S)
