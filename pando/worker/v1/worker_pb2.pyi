from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Finish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_NONE: _ClassVar[Finish]
    FINISH_STOP: _ClassVar[Finish]
    FINISH_LENGTH: _ClassVar[Finish]
    FINISH_CANCELLED: _ClassVar[Finish]
    FINISH_ERROR: _ClassVar[Finish]
    FINISH_DEADLINE: _ClassVar[Finish]
    FINISH_REJECTED: _ClassVar[Finish]
FINISH_NONE: Finish
FINISH_STOP: Finish
FINISH_LENGTH: Finish
FINISH_CANCELLED: Finish
FINISH_ERROR: Finish
FINISH_DEADLINE: Finish
FINISH_REJECTED: Finish

class RouterMessage(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "ping", "pin", "unpin", "follow", "unfollow", "republish")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    UNFOLLOW_FIELD_NUMBER: _ClassVar[int]
    REPUBLISH_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    submit: Submit
    cancel: Cancel
    ping: Ping
    pin: Pin
    unpin: Unpin
    follow: Follow
    unfollow: Unfollow
    republish: Republish
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pin: _Optional[_Union[Pin, _Mapping]] = ..., unpin: _Optional[_Union[Unpin, _Mapping]] = ..., follow: _Optional[_Union[Follow, _Mapping]] = ..., unfollow: _Optional[_Union[Unfollow, _Mapping]] = ..., republish: _Optional[_Union[Republish, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router", "key_fingerprint", "epoch")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    KEY_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    router: str
    key_fingerprint: str
    epoch: int
    def __init__(self, router: _Optional[str] = ..., key_fingerprint: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("scope_root", "end", "owner")
    SCOPE_ROOT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    scope_root: bytes
    end: int
    owner: bytes
    def __init__(self, scope_root: _Optional[bytes] = ..., end: _Optional[int] = ..., owner: _Optional[bytes] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("device_floor", "cpu_floor", "device_ceiling", "cpu_ceiling", "pinned")
    DEVICE_FLOOR_FIELD_NUMBER: _ClassVar[int]
    CPU_FLOOR_FIELD_NUMBER: _ClassVar[int]
    DEVICE_CEILING_FIELD_NUMBER: _ClassVar[int]
    CPU_CEILING_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    device_floor: int
    cpu_floor: int
    device_ceiling: int
    cpu_ceiling: int
    pinned: int
    def __init__(self, device_floor: _Optional[int] = ..., cpu_floor: _Optional[int] = ..., device_ceiling: _Optional[int] = ..., cpu_ceiling: _Optional[int] = ..., pinned: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("sequence", "request_id", "attempt", "token_ids", "num_prompt_tokens", "regions", "sampling", "priority", "deadline_ms", "no_store", "quota", "forks", "weight", "pull")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    NO_STORE_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    request_id: str
    attempt: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    sampling: SamplingParams
    priority: int
    deadline_ms: int
    no_store: bool
    quota: Quota
    forks: _containers.RepeatedCompositeFieldContainer[Fork]
    weight: int
    pull: Pull
    def __init__(self, sequence: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., no_store: _Optional[bool] = ..., quota: _Optional[_Union[Quota, _Mapping]] = ..., forks: _Optional[_Iterable[_Union[Fork, _Mapping]]] = ..., weight: _Optional[int] = ..., pull: _Optional[_Union[Pull, _Mapping]] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("sequence", "seed")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    seed: int
    def __init__(self, sequence: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Pin(_message.Message):
    __slots__ = ("prefix", "regions", "token_ids", "ttl_ms", "quota")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    prefix: bytes
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    ttl_ms: int
    quota: Quota
    def __init__(self, prefix: _Optional[bytes] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ..., token_ids: _Optional[_Iterable[int]] = ..., ttl_ms: _Optional[int] = ..., quota: _Optional[_Union[Quota, _Mapping]] = ...) -> None: ...

class Unpin(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: bytes
    def __init__(self, prefix: _Optional[bytes] = ...) -> None: ...

class Follow(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class Unfollow(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Republish(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "step", "events", "load", "pong", "snapshot")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    step: StepOutput
    events: Events
    load: Load
    pong: Pong
    snapshot: Snapshot
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ..., events: _Optional[_Union[Events, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker", "epoch", "model", "block_size", "key_fingerprint", "max_model_len", "vocab_size", "device_blocks", "pid")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KEY_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: int
    model: str
    block_size: int
    key_fingerprint: str
    max_model_len: int
    vocab_size: int
    device_blocks: int
    pid: int
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ..., model: _Optional[str] = ..., block_size: _Optional[int] = ..., key_fingerprint: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., device_blocks: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("cached_device_tokens", "cached_cpu_tokens", "cached_remote_tokens", "cached_published_tokens", "blocks_copied", "queue_ms", "pulled_tokens", "pull_ms", "peer_lacks")
    CACHED_DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_CPU_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_REMOTE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PUBLISHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_COPIED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULL_MS_FIELD_NUMBER: _ClassVar[int]
    PEER_LACKS_FIELD_NUMBER: _ClassVar[int]
    cached_device_tokens: int
    cached_cpu_tokens: int
    cached_remote_tokens: int
    cached_published_tokens: int
    blocks_copied: int
    queue_ms: float
    pulled_tokens: int
    pull_ms: float
    peer_lacks: bool
    def __init__(self, cached_device_tokens: _Optional[int] = ..., cached_cpu_tokens: _Optional[int] = ..., cached_remote_tokens: _Optional[int] = ..., cached_published_tokens: _Optional[int] = ..., blocks_copied: _Optional[int] = ..., queue_ms: _Optional[float] = ..., pulled_tokens: _Optional[int] = ..., pull_ms: _Optional[float] = ..., peer_lacks: _Optional[bool] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("sequence", "attempt", "first_index", "token_ids", "finish", "admission", "stop_token_id", "reason")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    attempt: int
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish: Finish
    admission: Admission
    stop_token_id: int
    reason: str
    def __init__(self, sequence: _Optional[int] = ..., attempt: _Optional[int] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[Finish, str]] = ..., admission: _Optional[_Union[Admission, _Mapping]] = ..., stop_token_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ...) -> None: ...

class Events(_message.Message):
    __slots__ = ("batches",)
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, batches: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("seq", "num_blocks", "digest", "tier", "keys", "first", "last")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    seq: int
    num_blocks: int
    digest: int
    tier: int
    keys: bytes
    first: bool
    last: bool
    def __init__(self, seq: _Optional[int] = ..., num_blocks: _Optional[int] = ..., digest: _Optional[int] = ..., tier: _Optional[int] = ..., keys: _Optional[bytes] = ..., first: _Optional[bool] = ..., last: _Optional[bool] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "queued_tokens", "free_blocks", "cached_blocks", "device_blocks", "prefill_tokens_per_s", "step_ms", "draining")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    queued_tokens: int
    free_blocks: int
    cached_blocks: int
    device_blocks: int
    prefill_tokens_per_s: float
    step_ms: float
    draining: bool
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., device_blocks: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., step_ms: _Optional[float] = ..., draining: _Optional[bool] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class FetchBlocksRequest(_message.Message):
    __slots__ = ("epoch", "key_fingerprint", "payload_format", "regions", "token_ids", "first", "count")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEY_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FORMAT_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    key_fingerprint: str
    payload_format: str
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    first: int
    count: int
    def __init__(self, epoch: _Optional[int] = ..., key_fingerprint: _Optional[str] = ..., payload_format: _Optional[str] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ..., token_ids: _Optional[_Iterable[int]] = ..., first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class BlockChunk(_message.Message):
    __slots__ = ("index", "payload", "checksum")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    index: int
    payload: bytes
    checksum: int
    def __init__(self, index: _Optional[int] = ..., payload: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class Pull(_message.Message):
    __slots__ = ("address", "epoch", "num_blocks", "timeout_ms")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    address: str
    epoch: int
    num_blocks: int
    timeout_ms: int
    def __init__(self, address: _Optional[str] = ..., epoch: _Optional[int] = ..., num_blocks: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("epoch", "deadline_ms")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    deadline_ms: int
    def __init__(self, epoch: _Optional[int] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("finished", "cancelled")
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    finished: int
    cancelled: int
    def __init__(self, finished: _Optional[int] = ..., cancelled: _Optional[int] = ...) -> None: ...

class PurgeRequest(_message.Message):
    __slots__ = ("roots",)
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    roots: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, roots: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PurgeResponse(_message.Message):
    __slots__ = ("device_blocks", "cpu_blocks", "remaining")
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CPU_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    device_blocks: int
    cpu_blocks: int
    remaining: int
    def __init__(self, device_blocks: _Optional[int] = ..., cpu_blocks: _Optional[int] = ..., remaining: _Optional[int] = ...) -> None: ...
