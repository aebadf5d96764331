"""The admin gRPC service: what this router believes of workers, and what it counted.

Knows the fleet's views and the metrics; all it changes is by purging a tenant. RPCs of the contract that
this version does not serve answer UNIMPLEMENTED.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kvstore.scope import TenantId
from pando.errors import InvalidRequest, NotFound, Unsupported
from pando.v1 import admin_pb2 as pb
from pando.v1 import admin_pb2_grpc
from pando.v1.inference_pb2 import GenerateRequest
from router.admission import Admission
from router.fleet import WorkerState, WorkerView
from router.interceptors import Call
from router.metrics import Metrics
from router.placement import Placement, Terms
from router.purging import PurgeReport
from router.recent import Recent
from router.tenants import is_tenant_name

_STATES = {
    WorkerState.CONNECTING: pb.WORKER_STATE_CONNECTING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
    WorkerState.REFUSED: pb.WORKER_STATE_REFUSED,
}


@dataclass(frozen=True, slots=True)
class RouterView:
    """What the admin service may look at, and the one thing it may do."""

    router_id: str
    metrics: Metrics
    admission: Admission
    workers: Callable[[], Sequence[WorkerView]]
    indexed_blocks: Callable[[], int]
    index_connected: Callable[[], bool]
    uptime_s: Callable[[], float]
    purge: Callable[[TenantId], Awaitable[PurgeReport]]
    recent: Callable[[str], Recent | None]
    explain: Callable[[TenantId, GenerateRequest], Awaitable[Placement]]


class AdminService(admin_pb2_grpc.AdminServicer):
    """`pando.v1.Admin`."""

    def __init__(self, view: RouterView) -> None:
        self._view = view

    async def ListWorkers(self, request: pb.ListWorkersRequest, call: Call) -> pb.ListWorkersResponse:
        return pb.ListWorkersResponse(workers=[_worker(worker) for worker in self._view.workers()])

    async def ListTenants(self, request: pb.ListTenantsRequest, call: Call) -> pb.ListTenantsResponse:
        view = self._view
        rows = [
            pb.Tenant(
                id=tenant,
                requests=tally.requests,
                prompt_tokens=tally.prompt_tokens,
                cached_tokens=tally.cached_tokens,
                completion_tokens=tally.completion_tokens,
                in_flight=view.admission.in_flight_of(tenant),
                failed=tally.failed,
            )
            for tenant, tally in sorted(view.metrics.tenants.items())
        ]
        return pb.ListTenantsResponse(tenants=rows)

    async def GetStats(self, request: pb.GetStatsRequest, call: Call) -> pb.GetStatsResponse:
        view, total = self._view, self._view.metrics.total
        return pb.GetStatsResponse(
            router=view.router_id,
            uptime_s=view.uptime_s(),
            requests=total.requests,
            failed=total.failed,
            in_flight=view.admission.in_flight,
            prompt_tokens=total.prompt_tokens,
            cached_tokens=total.cached_tokens,
            completion_tokens=total.completion_tokens,
            indexed_blocks=view.indexed_blocks(),
            index_connected=view.index_connected(),
        )

    async def DrainWorker(self, request: pb.DrainWorkerRequest, call: Call) -> pb.DrainWorkerResponse:
        raise Unsupported("draining a worker is not served by this version")

    async def PurgeTenant(self, request: pb.PurgeTenantRequest, call: Call) -> pb.PurgeTenantResponse:
        report = await self._view.purge(TenantId(request.tenant))
        return pb.PurgeTenantResponse(
            device_blocks=report.device_blocks,
            cpu_blocks=report.cpu_blocks,
            workers=report.workers,
            remaining_blocks=report.remaining_blocks,
            prefixes=report.prefixes,
        )

    async def ExplainPlacement(self, request: pb.ExplainPlacementRequest, call: Call) -> pb.ExplainPlacementResponse:
        if request.request_id:
            recent = self._view.recent(request.request_id)
            if recent is None:
                raise NotFound("no recent request of this router has this id")
            return _explained(recent)
        if not is_tenant_name(request.tenant):
            raise InvalidRequest("tenant is not the name of one")
        kind = request.WhichOneof("prompt")
        asked = GenerateRequest() if kind is None else GenerateRequest(**{kind: getattr(request, kind)})
        return _explained(Recent(0, await self._view.explain(TenantId(request.tenant), asked)))


def _worker(worker: WorkerView) -> pb.Worker:
    return pb.Worker(
        id=worker.id,
        epoch=worker.epoch,
        state=_STATES[worker.state],
        address=worker.address,
        model=worker.model,
        pid=worker.pid,
        running=worker.running,
        waiting=worker.waiting,
        device_blocks=worker.device_blocks,
        free_blocks=worker.free_blocks,
        cached_blocks=worker.cached_blocks,
        queued_tokens=worker.queued_tokens,
        prefill_tokens_per_s=worker.prefill_tokens_per_s,
        indexed_blocks=worker.indexed_blocks,
        reason=worker.reason,
    )


def _explained(recent: Recent) -> pb.ExplainPlacementResponse:
    placement = recent.placement
    response = pb.ExplainPlacementResponse(
        worker=placement.worker or "",
        reason=placement.reason,
        prompt_tokens=placement.num_tokens,
        candidates=[_candidate(terms) for terms in placement.terms],
        attempt=recent.attempt,
        retry_after_s=placement.retry_after_s,
    )
    response.candidates.extend(pb.PlacementCandidate(worker=w, excluded=reason) for w, reason in placement.excluded)
    if recent.found_cached is not None:
        response.found_cached_tokens = recent.found_cached
    return response


def _candidate(terms: Terms) -> pb.PlacementCandidate:
    return pb.PlacementCandidate(
        worker=terms.worker,
        plan=terms.plan,
        cached_tokens=terms.cached_tokens,
        expected_cached_tokens=terms.expected_cached,
        queue_s=terms.queue_s,
        slot_s=terms.slot_s,
        step_s=terms.step_s,
        plan_s=terms.plan_s,
        decode_s=terms.decode_s,
        behind_s=terms.behind_s,
        eviction_s=terms.eviction_s,
        ttft_s=terms.ttft_s,
        total_s=terms.total_s,
        pull_from=terms.pull.source if terms.pull is not None else "",
    )
