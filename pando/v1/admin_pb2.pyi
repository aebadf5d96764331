from pando.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_CONNECTING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_REFUSED: _ClassVar[WorkerState]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_CONNECTING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_REFUSED: WorkerState

class ListWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Worker(_message.Message):
    __slots__ = ("id", "epoch", "state", "address", "model", "pid", "running", "waiting", "device_blocks", "free_blocks", "cached_blocks", "queued_tokens", "prefill_tokens_per_s", "indexed_blocks", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    INDEXED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    epoch: int
    state: WorkerState
    address: str
    model: str
    pid: int
    running: int
    waiting: int
    device_blocks: int
    free_blocks: int
    cached_blocks: int
    queued_tokens: int
    prefill_tokens_per_s: float
    indexed_blocks: int
    reason: str
    def __init__(self, id: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[WorkerState, str]] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., pid: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., device_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., indexed_blocks: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("id", "deadline_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    deadline_s: float
    def __init__(self, id: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("moved_requests",)
    MOVED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    moved_requests: int
    def __init__(self, moved_requests: _Optional[int] = ...) -> None: ...

class ListTenantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("id", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "in_flight", "failed")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    id: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    in_flight: int
    failed: int
    def __init__(self, id: _Optional[str] = ..., requests: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., in_flight: _Optional[int] = ..., failed: _Optional[int] = ...) -> None: ...

class ListTenantsResponse(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    def __init__(self, tenants: _Optional[_Iterable[_Union[Tenant, _Mapping]]] = ...) -> None: ...

class PurgeTenantRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class PurgeTenantResponse(_message.Message):
    __slots__ = ("device_blocks", "cpu_blocks", "workers", "remaining_blocks", "prefixes")
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CPU_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    device_blocks: int
    cpu_blocks: int
    workers: int
    remaining_blocks: int
    prefixes: int
    def __init__(self, device_blocks: _Optional[int] = ..., cpu_blocks: _Optional[int] = ..., workers: _Optional[int] = ..., remaining_blocks: _Optional[int] = ..., prefixes: _Optional[int] = ...) -> None: ...

class ExplainPlacementRequest(_message.Message):
    __slots__ = ("tenant", "text", "token_ids", "chat", "request_id")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    text: str
    token_ids: _inference_pb2.TokenIds
    chat: _inference_pb2.Chat
    request_id: str
    def __init__(self, tenant: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_inference_pb2.TokenIds, _Mapping]] = ..., chat: _Optional[_Union[_inference_pb2.Chat, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class PlacementCandidate(_message.Message):
    __slots__ = ("worker", "plan", "cached_tokens", "expected_cached_tokens", "queue_s", "slot_s", "step_s", "plan_s", "decode_s", "behind_s", "eviction_s", "ttft_s", "total_s", "excluded", "pull_from")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    SLOT_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    PLAN_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    BEHIND_S_FIELD_NUMBER: _ClassVar[int]
    EVICTION_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    PULL_FROM_FIELD_NUMBER: _ClassVar[int]
    worker: str
    plan: str
    cached_tokens: int
    expected_cached_tokens: float
    queue_s: float
    slot_s: float
    step_s: float
    plan_s: float
    decode_s: float
    behind_s: float
    eviction_s: float
    ttft_s: float
    total_s: float
    excluded: str
    pull_from: str
    def __init__(self, worker: _Optional[str] = ..., plan: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., expected_cached_tokens: _Optional[float] = ..., queue_s: _Optional[float] = ..., slot_s: _Optional[float] = ..., step_s: _Optional[float] = ..., plan_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., behind_s: _Optional[float] = ..., eviction_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., total_s: _Optional[float] = ..., excluded: _Optional[str] = ..., pull_from: _Optional[str] = ...) -> None: ...

class ExplainPlacementResponse(_message.Message):
    __slots__ = ("worker", "reason", "prompt_tokens", "candidates", "attempt", "found_cached_tokens", "retry_after_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FOUND_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    worker: str
    reason: str
    prompt_tokens: int
    candidates: _containers.RepeatedCompositeFieldContainer[PlacementCandidate]
    attempt: int
    found_cached_tokens: int
    retry_after_s: float
    def __init__(self, worker: _Optional[str] = ..., reason: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., candidates: _Optional[_Iterable[_Union[PlacementCandidate, _Mapping]]] = ..., attempt: _Optional[int] = ..., found_cached_tokens: _Optional[int] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("router", "uptime_s", "requests", "failed", "in_flight", "prompt_tokens", "cached_tokens", "completion_tokens", "indexed_blocks", "index_connected")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INDEXED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INDEX_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    router: str
    uptime_s: float
    requests: int
    failed: int
    in_flight: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    indexed_blocks: int
    index_connected: bool
    def __init__(self, router: _Optional[str] = ..., uptime_s: _Optional[float] = ..., requests: _Optional[int] = ..., failed: _Optional[int] = ..., in_flight: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., indexed_blocks: _Optional[int] = ..., index_connected: _Optional[bool] = ...) -> None: ...
