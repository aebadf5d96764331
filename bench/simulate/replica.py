"""One worker of the simulated fleet: the real engine step, scheduler and pool over the cost model, on its own clock.

Knows no router. A step is run when it begins and says when it ends: nobody may hear of it earlier.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from bench.sharing.local_worker import SimulatedTime
from kvstore.block_key import key_fingerprint
from kvstore.block_pool import BlockPool
from kvstore.lease import Lease
from kvstore.scope import Region, ScopeRoot
from worker.admission import SchedulerLimits
from worker.batch import SamplingParams
from worker.engine import Engine, StepReport
from worker.runner import ModelSpec
from worker.scheduler import Scheduler
from worker.sequence import SequenceRequest
from worker.simulated_runner import SimulatedRunner, StepCost

MODEL = "simulated"
FINGERPRINT = bytes(16)
VOCAB_SIZE = 2048
ROOT = ScopeRoot(b"bench.simulation")
MAX_WAITING = 1 << 20


@dataclass(frozen=True, slots=True)
class ReplicaShape:
    """How big and how fast a worker is, in positions of the simulation."""

    num_blocks: int
    block_size: int
    cost: StepCost
    max_batch_tokens: int
    max_sequences: int
    max_model_len: int


class Replica:
    """`submit`, then `step` whenever it is due. `beside`: a replica whose pool this one has too."""

    def __init__(self, name: str, shape: ReplicaShape, beside: Replica | None = None) -> None:
        self.name = name
        self.shape = shape
        self.busy_s = 0.0
        self._time = SimulatedTime()
        spec = ModelSpec(MODEL, FINGERPRINT, VOCAB_SIZE, shape.max_model_len, (), shape.num_blocks, shape.block_size)
        self.runner: SimulatedRunner = SimulatedRunner(
            spec,
            shape.cost,
            sleep=self._time.sleep,
            clock=self._time.now,
            beside=None if beside is None else beside.runner,
        )
        self.pool: BlockPool = BlockPool(shape.num_blocks, shape.block_size) if beside is None else beside.pool
        limits = SchedulerLimits(shape.max_batch_tokens, shape.max_sequences, MAX_WAITING, shape.max_model_len)
        self._scheduler = Scheduler(self.pool, limits)
        self._reports: list[StepReport] = []
        self._engine = Engine(self.runner, self.pool, self._scheduler, self._reports.append, clock=self._time.now)

    @property
    def now(self) -> float:
        """When its last step ended."""
        return self._time.now()

    @property
    def has_work(self) -> bool:
        """Whether there are sequences, or requests that it will take at its next step."""
        return self._scheduler.num_sequences > 0

    def submit(self, number: int, token_ids: array[int], answer: int) -> None:
        """Take a request at the next step."""
        self._submit(number, token_ids, answer)

    def step(self, now: float) -> tuple[bool, list[StepReport]]:
        """One step from `now` on: whether a batch ran, and what there is to say once it has ended."""
        self._time.sleep(max(0.0, now - self._time.now()))
        ran = self._engine.step()
        self.busy_s += self._time.now() - now if ran else 0.0
        reports, self._reports[:] = self._reports.copy(), []
        return ran, reports

    def warm_up(self) -> None:
        """As a real engine does at its start: run something unseen, so that the rates are measured."""
        self._submit(0, array("I", [0]) * (2 * self.shape.block_size), 2, no_store=True)
        while self.step(self.now)[0]:
            pass
        self.busy_s = 0.0

    def lease(self) -> Lease:
        """What routers learn of it first."""
        shape = self.shape
        return Lease(
            worker_id=self.name,
            epoch=1,
            address=self.name,
            model=MODEL,
            block_size=shape.block_size,
            key_fingerprint=key_fingerprint(FINGERPRINT, shape.block_size),
            model_fingerprint=FINGERPRINT.hex(),
            pid=1,
            device_blocks=self.pool.num_blocks,
            max_model_len=shape.max_model_len,
            vocab_size=VOCAB_SIZE,
            prefill_tokens_per_s=self._engine.load().prefill_tokens_per_s,
            max_sequences=shape.max_sequences,
            max_batch_tokens=shape.max_batch_tokens,
        )

    def _submit(self, number: int, token_ids: array[int], answer: int, *, no_store: bool = False) -> None:
        sampling = SamplingParams(max_tokens=answer)
        regions = (Region(ROOT, None),)
        self._engine.submit(SequenceRequest(number, token_ids, len(token_ids), regions, sampling, no_store=no_store))
