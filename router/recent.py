"""The newest placements of this router by request id, so that one can be asked about after it was made.

Holds no prompt. Invariant: bounded; of requests with one id the newest is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from router.placement import Placement

MOST = 512


@dataclass(frozen=True, slots=True)
class Recent:
    """One decision. `found_cached`: prompt tokens that the worker then had; None while it has not said so."""

    attempt: int
    placement: Placement
    found_cached: int | None = None


class RecentPlacements:
    """A ring of decisions."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._by_request: OrderedDict[str, Recent] = OrderedDict()

    def add(self, request_id: str, attempt: int, placement: Placement) -> None:
        """A request was placed, or could not be."""
        self._by_request.pop(request_id, None)
        self._by_request[request_id] = Recent(attempt, placement)
        if len(self._by_request) > self._most:
            self._by_request.popitem(last=False)

    def found(self, request_id: str, cached_tokens: int) -> None:
        """What its worker had of it."""
        recent = self._by_request.get(request_id)
        if recent is not None:
            self._by_request[request_id] = replace(recent, found_cached=cached_tokens)

    def of(self, request_id: str) -> Recent | None:
        """The newest decision about a request; None for one that is not known any more."""
        return self._by_request.get(request_id)
