"""The worker link's messages as what the engine knows, and back.

Knows no session and no thread. Whatever a router sends, what comes out of here makes sense: a message that does not is
an `InvalidRequest` with a fixed word as its reason.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from kvstore.exchange import Export
from kvstore.ledger import SnapshotPart
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot, check_regions
from pando.errors import InvalidRequest
from pando.worker.v1 import worker_pb2 as pb
from worker.batch import SamplingParams
from worker.holdings import OwnerQuota, PinRequest, Publishers
from worker.sequence import AdmissionFacts, Finish, Fork, SequenceOutput, SequenceRequest
from worker.session import Attempt, News

ID_BYTES = 16
MAX_EVENT_BYTES = 1024 * 1024

_FINISH = {
    Finish.STOP: pb.FINISH_STOP,
    Finish.LENGTH: pb.FINISH_LENGTH,
    Finish.CANCELLED: pb.FINISH_CANCELLED,
    Finish.ERROR: pb.FINISH_ERROR,
    Finish.DEADLINE: pb.FINISH_DEADLINE,
    Finish.REJECTED: pb.FINISH_REJECTED,
}


def sequence_request(submit: pb.Submit, engine_ids: list[int], vocab_size: int, now: float) -> SequenceRequest:
    """The request in a Submit; `engine_ids` are for its own sequence and those of its forks."""
    token_ids = array("I", submit.token_ids)
    _require(0 < submit.num_prompt_tokens <= len(token_ids))
    _require(not submit.forks or submit.num_prompt_tokens == len(token_ids))
    _require(max(token_ids) < vocab_size)
    regions = _regions(submit.regions)
    # A shared scope never reaches over what was generated.
    _require(all(region.end is None or region.end <= submit.num_prompt_tokens for region in regions))
    return SequenceRequest(
        sequence_id=engine_ids[0],
        token_ids=token_ids,
        num_prompt_tokens=submit.num_prompt_tokens,
        regions=regions,
        sampling=_sampling(submit.sampling, vocab_size),
        priority=submit.priority,
        deadline=now + submit.deadline_ms / 1e3 if submit.deadline_ms else None,
        no_store=submit.no_store,
        forks=tuple(Fork(i, fork.seed) for i, fork in zip(engine_ids[1:], submit.forks, strict=True)),
        publishers=_publishers(submit.regions),
        quota=_quota(submit.quota) if submit.HasField("quota") else None,
        weight=max(submit.weight, 1),
    )


@dataclass(frozen=True, slots=True)
class PullOrder:
    """Where the head of a prompt is. Its first `num_blocks` full blocks are believed to be there."""

    address: str
    epoch: int
    num_blocks: int
    timeout_s: float


def pull_order(submit: pb.Submit) -> PullOrder | None:
    """What a Submit says of blocks to fetch first."""
    pull = submit.pull
    if not pull.num_blocks or not pull.timeout_ms or not pull.address:
        return None
    return PullOrder(pull.address, pull.epoch, pull.num_blocks, pull.timeout_ms / 1e3)


def regions_message(regions: Iterable[Region]) -> list[pb.Region]:
    """Regions as they cross the wire, without owners."""
    return [pb.Region(scope_root=region.root, end=region.end or 0) for region in regions]


def export_order(request: pb.FetchBlocksRequest, vocab_size: int) -> Export:
    """The export that a FetchBlocksRequest asks for."""
    _require(bool(request.token_ids) and max(request.token_ids) < vocab_size)
    return Export(_regions(request.regions), array("I", request.token_ids), request.first, request.count)


def pin_request(pin: pb.Pin, vocab_size: int) -> PinRequest:
    """The request in a Pin."""
    _require(len(pin.prefix) == ID_BYTES and bool(pin.token_ids) and max(pin.token_ids) < vocab_size)
    return PinRequest(
        name=pin.prefix.hex(),
        regions=_regions(pin.regions),
        publishers=_publishers(pin.regions),
        token_ids=array("I", pin.token_ids),
        ttl_s=pin.ttl_ms / 1e3,
        quota=_quota(pin.quota) if pin.HasField("quota") else None,
    )


def purge_roots(request: pb.PurgeRequest) -> list[ScopeRoot]:
    """The owners in a PurgeRequest."""
    _require(all(len(root) == ID_BYTES for root in request.roots))
    return [ScopeRoot(root) for root in request.roots]


def _regions(messages: Iterable[pb.Region]) -> tuple[Region, ...]:
    regions = tuple(Region(ScopeRoot(message.scope_root), message.end or None) for message in messages)
    try:
        check_regions(regions)
    except ValueError as error:
        raise _malformed() from error
    return regions


def _publishers(messages: Iterable[pb.Region]) -> Publishers:
    named = [(ScopeRoot(message.scope_root), ScopeRoot(message.owner)) for message in messages if message.owner]
    _require(all(len(owner) == ID_BYTES for _, owner in named))
    return tuple(named)


def _quota(message: pb.Quota) -> OwnerQuota:
    device_ceiling = message.device_ceiling if message.HasField("device_ceiling") else None
    cpu_ceiling = message.cpu_ceiling if message.HasField("cpu_ceiling") else None
    try:
        device = Quota(message.device_floor, device_ceiling, message.pinned)
        return OwnerQuota(device, Quota(message.cpu_floor, cpu_ceiling))
    except ValueError as error:
        raise _malformed() from error


def _sampling(message: pb.SamplingParams, vocab_size: int) -> SamplingParams:
    _require(message.max_tokens > 0 and message.min_tokens <= message.max_tokens)
    _require(math.isfinite(message.temperature) and message.temperature >= 0)
    _require(0 <= message.top_p <= 1 and 0 <= message.min_p <= 1)
    _require(all(token_id < vocab_size for token_id in message.stop_token_ids))
    if message.presence_penalty or message.frequency_penalty or message.repetition_penalty not in (0, 1):
        raise InvalidRequest("this worker knows no penalties", reason="UNSUPPORTED")
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p or 1.0,
        min_p=message.min_p,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
    )


def _require(fact: bool) -> None:
    if not fact:
        raise _malformed()


def _malformed() -> InvalidRequest:
    return InvalidRequest("the request makes no sense", reason="MALFORMED")


def worker_messages(news: News) -> Iterator[pb.WorkerMessage]:
    """What a session has to say, in messages."""
    for nonce in news.pongs:
        yield pb.WorkerMessage(pong=pb.Pong(nonce=nonce))
    if news.outputs:
        outputs = [_output_message(attempt, output) for attempt, output in news.outputs.items()]
        yield pb.WorkerMessage(step=pb.StepOutput(sequences=outputs))
    yield from _feed_messages(news.feed)
    if news.load is not None:
        yield pb.WorkerMessage(load=pb.Load(**asdict(news.load)))


def _feed_messages(feed: Sequence[bytes | SnapshotPart]) -> Iterator[pb.WorkerMessage]:
    """In order; batches that follow each other go together, up to a bounded size."""
    batches: list[bytes] = []
    size = 0
    for told in feed:
        if batches and (isinstance(told, SnapshotPart) or size + len(told) > MAX_EVENT_BYTES):
            yield pb.WorkerMessage(events=pb.Events(batches=batches))
            batches, size = [], 0
        if isinstance(told, SnapshotPart):
            yield pb.WorkerMessage(snapshot=_snapshot_message(told))
        else:
            batches.append(told)
            size += len(told)
    if batches:
        yield pb.WorkerMessage(events=pb.Events(batches=batches))


def _snapshot_message(part: SnapshotPart) -> pb.Snapshot:
    at = part.position
    return pb.Snapshot(
        seq=at.seq,
        num_blocks=at.num_blocks,
        digest=at.digest,
        tier=part.tier,
        keys=part.keys,
        first=part.is_first,
        last=part.is_last,
    )


def _output_message(attempt: Attempt, output: SequenceOutput) -> pb.SequenceOutput:
    return pb.SequenceOutput(
        sequence=attempt.sequence,
        attempt=attempt.attempt,
        first_index=output.first_index,
        token_ids=output.token_ids,
        finish=_FINISH[output.finish] if output.finish else pb.FINISH_NONE,
        admission=_admission_message(output.admission) if output.admission else None,
        stop_token_id=output.stop_token_id or 0,
        reason=output.reason,
    )


def _admission_message(facts: AdmissionFacts) -> pb.Admission:
    return pb.Admission(
        cached_device_tokens=facts.cached_device_tokens,
        cached_cpu_tokens=facts.cached_cpu_tokens,
        cached_remote_tokens=facts.cached_remote_tokens,
        cached_published_tokens=facts.cached_published_tokens,
        blocks_copied=facts.blocks_copied,
        queue_ms=facts.queue_s * 1e3,
        pulled_tokens=facts.pulled_tokens,
        pull_ms=facts.pull_s * 1e3,
        peer_lacks=facts.peer_lacks,
    )
