"""What goes over the link to a worker, as frozen values, and how each is written in the link's messages.

Knows no session and no channel. Invariant: values hold no protobuf, so that nothing behind the link knows its wire.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.following import FeedRequest
from kvstore.ledger import Position, SnapshotPart
from kvstore.scope import Region, ScopeRoot
from pando.worker.v1 import worker_pb2 as pb
from router.tenants import NO_QUOTA, KvQuota

MAX_TTL_MS = 2**32 - 1

_FINISH = {
    pb.FINISH_STOP: "stop",
    pb.FINISH_LENGTH: "length",
    pb.FINISH_CANCELLED: "cancelled",
    pb.FINISH_ERROR: "error",
    pb.FINISH_DEADLINE: "deadline",
    pb.FINISH_REJECTED: "rejected",
}


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """How tokens are chosen. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token."""

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PullOrder:
    """Where a worker shall fetch the first full blocks of a prompt before it computes, and how long it shall wait."""

    address: str
    epoch: int
    num_blocks: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Submission:
    """One attempt at a request, as the worker gets it. `timeout_s` is the time left when it is sent."""

    request_id: str
    attempt: int
    token_ids: array[int]  # 'I'
    num_prompt_tokens: int
    regions: tuple[Region, ...]
    owners: tuple[ScopeRoot, ...]  # beside the regions: whom their blocks are charged to
    sampling: SamplingChoice
    priority: int
    timeout_s: float
    no_store: bool
    quota: KvQuota = NO_QUOTA  # of the tenant whose request it is
    weight: int = 1  # likewise
    fork_seeds: tuple[int, ...] = ()  # of each further answer to the same prompt
    pull: PullOrder | None = None


@dataclass(frozen=True, slots=True)
class PinOrder:
    """A prefix whose blocks a worker shall keep for `ttl_s`, within its publisher's quota. `prefix` has 16 bytes."""

    prefix: bytes
    token_ids: array[int]  # 'I'
    regions: tuple[Region, ...]
    owners: tuple[ScopeRoot, ...]
    ttl_s: float
    quota: KvQuota


@dataclass(frozen=True, slots=True)
class Purged:
    """Blocks that a worker forgot; `remaining` of them are still held by sequences that run."""

    device_blocks: int
    cpu_blocks: int
    remaining: int

    def then(self, later: Purged) -> Purged:
        """Of two times together."""
        return Purged(self.device_blocks + later.device_blocks, self.cpu_blocks + later.cpu_blocks, later.remaining)


@dataclass(frozen=True, slots=True)
class AdmissionReport:
    """What the worker found when it admitted the sequence, in prompt tokens, and what became of its pull.

    `pull_s`: from its start to its end, 0 where nothing was fetched for this request. `pulled_tokens` came, of which
    `cached_remote` were used; `peer_lacks`: the other worker said that it has none.
    """

    cached_device: int = 0
    cached_cpu: int = 0
    cached_remote: int = 0
    cached_published: int = 0
    blocks_copied: int = 0
    queue_ms: float = 0.0
    pulled_tokens: int = 0
    pull_s: float = 0.0
    peer_lacks: bool = False

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed, wherever they came from."""
        return self.cached_device + self.cached_cpu + self.cached_remote


@dataclass(frozen=True, slots=True)
class LinkOutput:
    """New tokens of one sequence, or its end. `finish` is a word of the worker's `Finish`, in lower case.

    `fork` is 0 for the sequence of the submission itself, i for its i-th fork.
    """

    fork: int
    attempt: int
    first_index: int
    token_ids: tuple[int, ...]
    finish: str | None = None
    admission: AdmissionReport | None = None
    stop_token_id: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """What the worker says of itself when a session begins."""

    worker: str
    epoch: int
    block_size: int
    key_fingerprint: str


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How busy the worker said it was."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    step_ms: float = 0.0
    draining: bool = False


def feed_message(request: FeedRequest) -> pb.RouterMessage:
    """The message for what a mirror asks of a worker."""
    match request.kind:
        case "follow":
            return pb.RouterMessage(follow=pb.Follow(seq=request.seq))
        case "unfollow":
            return pb.RouterMessage(unfollow=pb.Unfollow())
        case "republish":
            return pb.RouterMessage(republish=pb.Republish())


def snapshot_part(part: pb.Snapshot) -> SnapshotPart:
    """What a worker said of all that it holds."""
    position = Position(part.seq, part.num_blocks, part.digest)
    return SnapshotPart(position, part.tier, part.keys, part.first, part.last)


def submit_message(sequences: Sequence[int], submission: Submission) -> pb.Submit:
    """The message for sequences to run: a number for the first and for each fork."""
    sampling = submission.sampling
    return pb.Submit(
        sequence=sequences[0],
        request_id=submission.request_id,
        attempt=submission.attempt,
        token_ids=submission.token_ids,
        num_prompt_tokens=submission.num_prompt_tokens,
        regions=_regions(submission.regions, submission.owners),
        sampling=pb.SamplingParams(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop_token_ids=sampling.stop_token_ids,
        ),
        priority=submission.priority,
        deadline_ms=max(1, int(submission.timeout_s * 1000)),
        no_store=submission.no_store,
        quota=None if submission.quota == NO_QUOTA else _quota(submission.quota),
        weight=submission.weight,
        forks=[
            pb.Fork(sequence=number, seed=seed)
            for number, seed in zip(sequences[1:], submission.fork_seeds, strict=True)
        ],
        pull=None if submission.pull is None else _pull(submission.pull, submission.timeout_s),
    )


def _pull(order: PullOrder, time_left_s: float) -> pb.Pull:
    """Half of the time that is left is kept for what does not come."""
    timeout_ms = max(1, int(min(order.timeout_s, time_left_s / 2) * 1000))
    return pb.Pull(address=order.address, epoch=order.epoch, num_blocks=order.num_blocks, timeout_ms=timeout_ms)


def pin_message(order: PinOrder) -> pb.Pin:
    """The message for a pin."""
    return pb.Pin(
        prefix=order.prefix,
        regions=_regions(order.regions, order.owners),
        token_ids=order.token_ids,
        ttl_ms=min(MAX_TTL_MS, max(1, int(order.ttl_s * 1000))),
        quota=_quota(order.quota),
    )


def _regions(regions: Sequence[Region], owners: Sequence[ScopeRoot]) -> list[pb.Region]:
    """An owner that is the scope itself is left out."""
    return [
        pb.Region(scope_root=region.root, end=region.end or 0, owner=b"" if owner == region.root else owner)
        for region, owner in zip(regions, owners, strict=True)
    ]


def _quota(quota: KvQuota) -> pb.Quota:
    return pb.Quota(
        device_floor=quota.device_floor,
        cpu_floor=quota.cpu_floor,
        device_ceiling=quota.device_ceiling,
        cpu_ceiling=quota.cpu_ceiling,
        pinned=quota.pinned,
    )


def link_output(output: pb.SequenceOutput, fork: int) -> LinkOutput:
    """What a worker said of one sequence."""
    finish = _FINISH.get(output.finish)
    return LinkOutput(
        fork=fork,
        attempt=output.attempt,
        first_index=output.first_index,
        token_ids=tuple(output.token_ids),
        finish=finish,
        admission=_admission(output.admission) if output.HasField("admission") else None,
        stop_token_id=output.stop_token_id if finish == "stop" else None,
        reason=output.reason,
    )


def _admission(admission: pb.Admission) -> AdmissionReport:
    return AdmissionReport(
        cached_device=admission.cached_device_tokens,
        cached_cpu=admission.cached_cpu_tokens,
        cached_remote=admission.cached_remote_tokens,
        cached_published=admission.cached_published_tokens,
        blocks_copied=admission.blocks_copied,
        queue_ms=admission.queue_ms,
        pulled_tokens=admission.pulled_tokens,
        pull_s=admission.pull_ms / 1e3,
        peer_lacks=admission.peer_lacks,
    )


def worker_load(load: pb.Load) -> WorkerLoad:
    """What a worker said of itself."""
    return WorkerLoad(
        running=load.running,
        waiting=load.waiting,
        queued_tokens=load.queued_tokens,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        step_ms=load.step_ms,
        draining=load.draining,
    )
