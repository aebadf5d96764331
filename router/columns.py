"""What the cost of a prompt is computed from: the prompt, and what is believed of each worker, a number for each.

Knows no clock and no live state. Columns, so that 500 workers take hardly longer than 8; rows are workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from kvstore.block import WorkerId
from router.unheard import Others

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What placement needs of a request. `tie_key` is equal for requests that should meet on an idle fleet.

    `ttft_s` is the time to first token that its tenant shall get; 0 for none.
    """

    num_tokens: int
    max_tokens: int
    tie_key: bytes
    ttft_s: float = 0.0

    @property
    def num_positions(self) -> int:
        """Most positions the request can fill; its last token is never computed."""
        return self.num_tokens + self.max_tokens - 1


@dataclass(frozen=True, slots=True)
class PullRates:
    """What blocks of a peer cost: `start_s` once, `s_per_token` for each, times one more for each pull there is."""

    start_s: float
    s_per_token: float


@dataclass(frozen=True, slots=True)
class Sources:
    """Who may give blocks to whom: the rows of each group to each other. `pulls` under way from each, and the share
    that came of what was asked of it lately."""

    rates: PullRates
    groups: tuple[NDArray[np.intp], ...]
    pulls: Floats
    shares: Floats


@dataclass(slots=True)
class Columns:
    """What is believed of each worker whatever the prompt; rows are workers. See `placement.Candidate` for each.

    `others`: what other routers are expected to place at this moment.
    """

    workers: tuple[WorkerId, ...]
    name_hashes: NDArray[np.uint64]
    queued: Floats
    s_per_token: Floats
    step_s: Floats
    slot_s: Floats
    running: Floats
    free_tokens: Floats
    reuse: Floats
    load_share: Floats
    confidence: Floats
    arrivals_per_s: Floats
    utilization: Floats
    others: Others | None = None

    @staticmethod
    def of(workers: Sequence[WorkerId]) -> Columns:
        """Rows of zeros, and of full confidence, for these workers."""
        hashes = np.array([xxh3_64_intdigest(worker.encode()) for worker in workers], dtype=np.uint64)
        columns = Columns(tuple(workers), hashes, *np.zeros((_NUM_FLOATS, len(workers))))
        columns.confidence[:] = 1.0
        return columns


_NUM_FLOATS = sum(field.type == "Floats" for field in fields(Columns))


@dataclass(slots=True)
class Held:
    """Prompt tokens by worker, each a prefix: on its device; on either tier; on its device or being computed.

    None where no worker has more than on its device, or none can give blocks to another. `length_factor`: how much
    longer than the average a token takes in prompts of this length. `ahead`: of each queue the part that is served
    before this prompt; None for all.
    """

    device: Floats
    tiers: Floats | None = None
    computing: Floats | None = None
    sources: Sources | None = None
    length_factor: float = 1.0
    ahead: Floats | None = None


def rendezvous(rows: Columns, among: NDArray[np.intp], key: bytes) -> int:
    """The one of these rows with the highest hash of worker and key: for one key the same in every router."""
    mixed = rows.name_hashes[among] ^ np.uint64(xxh3_64_intdigest(key))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(among[(mixed ^ (mixed >> np.uint64(31))).argmax()])
