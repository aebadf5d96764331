"""When the next step may be decided while the one before it runs: only where waiting for its end could change nothing.

Knows batches and sequences. Invariant: what is decided ahead is what would be decided after, but for sequences that a
token nobody knows yet ends; and nobody who waits is served a step later for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from worker.batch import Batch, ScheduledSequence
from worker.sequence import Sequence


def leaves_open(batch: Batch, sequences: Mapping[int, Sequence], *, somebody_waits: bool) -> bool:
    """Whether the end of this step decides who runs next, or in which blocks.

    Forks go apart then, and the block in which a published head ends becomes one to copy from. Where somebody waits,
    computed prompt tokens may be what he waits for, and a sequence that ends by its length makes room for him.
    """
    return any(
        _parts(share, sequence) or (somebody_waits and _makes_way(share, sequence))
        for share in batch.sequences
        if (sequence := sequences.get(share.sequence_id)) is not None
    )


def _parts(share: ScheduledSequence, sequence: Sequence) -> bool:
    return bool(share.fork_sampling) or any(region.end == share.end for region in sequence.request.regions)


def _makes_way(share: ScheduledSequence, sequence: Sequence) -> bool:
    computes_prompt = share.start < len(sequence.request.token_ids) or len(share.token_ids) > 1
    return sequence.is_decided or computes_prompt
