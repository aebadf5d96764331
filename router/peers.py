"""What the other routers of a fleet have sent to each worker and have no answer to yet, told through Redis.

Knows workers by id and epoch and prompts by block keys; decides nothing. Invariant: what a router last said counts
until it says something else or is silent for `TTL_S`; nothing adds up over time, so a lost or doubled message heals.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import redis.asyncio
from redis.exceptions import RedisError

from kvstore.block import BlockKey, WorkerId
from router.lines import Line, Owner, joined
from router.unheard import Unheard

log = logging.getLogger(__name__)

EVERY_S = 0.05
TTL_S = 0.5
FRESH_S = 2 * EVERY_S
"""So old may be the newest thing that routers know of each other: what each said, and when the other heard it."""
KEY_BYTES = 8
"""Of each block key, on the wire: a false hit costs time only."""
_PER_OCTAVE = 8
_MOST_BLOCKS = 1 << 20


class SentLoad(msgspec.Struct, frozen=True, array_like=True):
    """One router's requests at one worker. `computing`: marks of the prompts that it has no first token of.

    `waiting`: of the sequences in flight those without a first token.
    `arrivals_per_s` and `utilization` (seconds of work a second): what it sent there of late.
    `fresh_tokens`: of those queued what it sent in the last `FRESH_S`. `line`: owner, weight and
    tokens of those who wait, as in `Waiting`.
    """

    epoch: int
    queued_tokens: int
    in_flight: int
    computing: bytes = b""
    arrivals_per_s: float = 0.0
    utilization: float = 0.0
    waiting: int = 0
    fresh_tokens: int = 0
    line: tuple[tuple[bytes, int, int], ...] = ()


Loads = dict[str, SentLoad]
Place = tuple[WorkerId, int]
"""A worker and its epoch."""


class Total(NamedTuple):
    """What all others have at one place together; fields of `SentLoad`."""

    queued_tokens: int = 0
    in_flight: int = 0
    arrivals_per_s: float = 0.0
    utilization: float = 0.0
    waiting: int = 0
    line: Line = MappingProxyType({})

    def plus(self, load: SentLoad) -> Total:
        """With one more router's."""
        return Total(
            self.queued_tokens + load.queued_tokens,
            self.in_flight + load.in_flight,
            self.arrivals_per_s + load.arrivals_per_s,
            self.utilization + load.utilization,
            self.waiting + load.waiting,
            joined(self.line, {Owner(owner): (weight, tokens) for owner, weight, tokens in load.line}),
        )


NOTHING = Total()


def marks(keys: Sequence[BlockKey], start: int) -> bytes:
    """A prompt's chain of keys in few bytes: those at the depths of a ladder, from `start` full blocks on.

    The ladder is the same for every prompt: each depth up to 16, then 8 in each doubling. So prompts with a common head
    have marks in common up to at most an eighth less.
    """
    depths = _LADDER[bisect_right(_LADDER, start) : bisect_right(_LADDER, len(keys))]
    return b"".join([keys[depth - 1][:KEY_BYTES] for depth in depths])


class PeerLoads:
    """The sum of what the others say. Look-ups cost nothing where nobody says anything."""

    def __init__(self) -> None:
        self._totals: dict[Place, Total] = {}
        self._places_of: dict[bytes, set[Place]] = {}
        self._news: set[Place] = set()
        self.unheard = Unheard()

    def take(self, said: Iterable[Loads]) -> None:
        """What all others say now, in place of what they said before."""
        totals: dict[Place, Total] = {}
        places_of: dict[bytes, set[Place]] = {}
        fresh_tokens = 0
        for loads in said:
            for worker, load in loads.items():
                place = (WorkerId(worker), load.epoch)
                fresh_tokens += load.fresh_tokens
                totals[place] = totals.get(place, NOTHING).plus(load)
                for at in range(0, len(load.computing), KEY_BYTES):
                    places_of.setdefault(load.computing[at : at + KEY_BYTES], set()).add(place)
        before = self._totals
        self._news.update(place for place in totals.keys() | before.keys() if totals.get(place) != before.get(place))
        self._totals, self._places_of = totals, places_of
        self.unheard.hear(fresh_tokens)

    def at(self, worker: WorkerId, epoch: int) -> Total:
        """What others sent there and wait for."""
        return self._totals.get((worker, epoch), NOTHING)

    def news(self) -> Collection[Place]:
        """Where that is another than when this was last asked."""
        if not self._news:
            return ()
        news, self._news = self._news, set()
        return news

    def computing(self, keys: Sequence[BlockKey]) -> Mapping[Place, int]:
        """How many leading blocks of a prompt are computed where others sent a prompt with that head."""
        found: dict[Place, int] = {}
        if not self._places_of:
            return found
        for depth in _LADDER[: bisect_right(_LADDER, len(keys))]:
            for place in self._places_of.get(keys[depth - 1][:KEY_BYTES], ()):
                found[place] = depth
        return found


class PeerExchange:
    """Says what this router sent, hears what the others did. For one event loop.

    `own` gives this router's loads; `client` should wait no longer than a few `EVERY_S` for Redis.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        cluster: str,
        *,
        router: str,
        own: Callable[[], Loads],
        loads: PeerLoads,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._cluster = cluster
        self._router = router
        self._own = own
        self._loads = loads
        self._clock = clock
        self._others: list[str] = []
        self._heard_at = clock()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Exchange from now on."""
        self._task = asyncio.create_task(self._run(), name="router-peers")

    async def stop(self) -> None:
        """Stop; the others forget what we said. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            self._stopping.set()
            await task

    async def _run(self) -> None:
        away = False
        while not self._stopping.is_set():
            try:
                await self._exchange()
                away = False
            except (RedisError, OSError):
                if not away:
                    log.warning("the other routers are out of reach: their requests are not counted")
                away = True
                if self._clock() - self._heard_at > TTL_S:
                    self._loads.take(())
            await self._pause()
        await self._say_nothing()

    async def _exchange(self) -> None:
        """One round trip: our own loads down, everybody's names and the loads of those known up."""
        raw = msgspec.msgpack.encode(self._own())
        pipe = self._client.pipeline(transaction=False)
        pipe.set(self._name(self._router), raw, px=int(TTL_S * 1000))
        pipe.zrange(f"{self._cluster}:routers", 0, -1)
        if self._others:
            pipe.mget([self._name(other) for other in self._others])
        _, names, *said = await pipe.execute()
        self._others = [name for name in map(_text, names) if name != self._router]
        self._heard_at = self._clock()
        self._loads.unheard.stand(self._others, self._router)
        self._loads.take(_decoded(said[0] if said else ()))

    async def _say_nothing(self) -> None:
        try:
            await self._client.delete(self._name(self._router))
        except (RedisError, OSError):
            return

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(EVERY_S):
                await self._stopping.wait()
        except TimeoutError:
            return

    def _name(self, router: str) -> str:
        return f"{self._cluster}:router:{router}:sent"


def _decoded(said: Iterable[bytes | None]) -> list[Loads]:
    """What can be read of it."""
    found: list[Loads] = []
    for raw in said:
        if raw is None:
            continue
        try:
            found.append(_DECODER.decode(raw))
        except msgspec.MsgspecError:
            continue
    return found


def _text(raw: Any) -> str:
    return raw if isinstance(raw, str) else raw.decode("utf-8", "replace")


def _ladder() -> tuple[int, ...]:
    depths: list[int] = []
    depth, step = 1, 1
    while depth <= _MOST_BLOCKS:
        depths.append(depth)
        depth += step
        if depth >= 2 * _PER_OCTAVE * step:
            step *= 2
    return tuple(depths)


_LADDER = _ladder()
_DECODER = msgspec.msgpack.Decoder(Loads)
