"""A Redis in memory for the prefix index: its commands and scripts on dictionaries, and faults on request.

It stands in for the transport and for what the scripts do, nothing else: who decides is the real code. Faults: it is
away, answers get lost after the work was done, stream entries vanish, come twice or in another order.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import redis

from kvstore import lease, redis_scripts


class MemoryRedis:
    """What is kept; `for_worker` and `for_router` are clients of it."""

    def __init__(self, rng: random.Random) -> None:
        self.data: dict[str, Any] = {}
        self.away = False
        self.mute = 0  # so many of the next calls are done and not answered
        self.shuffled = 0  # so many of the next stream readings come twice over and out of order
        self._rng = rng

    def flush(self) -> None:
        self.data.clear()

    def dump(self) -> dict[str, Any]:
        return copy.deepcopy(self.data)

    def restore(self, dump: dict[str, Any]) -> None:
        self.data = copy.deepcopy(dump)

    def expire_leases(self) -> None:
        for key in [key for key in self.data if key.endswith(":lease")]:
            del self.data[key]

    def lose_entry(self, worker: str, *, newest: bool = False) -> None:
        """One entry of a stream is gone, as if it had never been written."""
        stream = self.data.get(_key(worker, "events"))
        if stream:
            del stream[list(stream)[-1] if newest else self._rng.choice(list(stream))]

    def lose_bucket(self, worker: str) -> None:
        """A part of a current set is gone."""
        if buckets := [key for key in self.data if key.startswith(_key(worker, "set:"))]:
            del self.data[self._rng.choice(buckets)]

    def call(self, work: Callable[[], Any]) -> Any:
        if self.away:
            raise redis.ConnectionError("away")
        answer = work()
        if self.mute:
            self.mute -= 1
            raise redis.TimeoutError("no answer")
        return answer

    def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        plain = [arg if isinstance(arg, bytes) else str(arg) for arg in args]
        return self.call(lambda: _SCRIPTS[script](self.data, keys, plain))

    def read_streams(self, cursors: dict[bytes, str], count: int) -> list[Any]:
        found = []
        for stream, cursor in cursors.items():
            entries = self.data.get(stream.decode(), {})
            after = _number(cursor)
            new = [(key.encode(), {b"b": payload}) for key, payload in entries.items() if _number(key) > after][:count]
            if new and self.shuffled:
                new += [new[0]]
                self._rng.shuffle(new)
            if new:
                found.append([stream, new])
        self.shuffled = max(0, self.shuffled - 1)
        return found


class WorkerClient:
    """As `redis.Redis`."""

    def __init__(self, server: MemoryRedis) -> None:
        self._server = server

    def register_script(self, text: str) -> Callable[..., Any]:
        return lambda keys, args: self._server.run(text, keys, args)

    def incr(self, key: str) -> int:
        def work() -> int:
            self._server.data[key] = str(int(self._server.data.get(key, "0")) + 1)
            return int(self._server.data[key])

        return int(self._server.call(work))


class RouterClient:
    """As `redis.asyncio.Redis`."""

    def __init__(self, server: MemoryRedis) -> None:
        self._server = server

    def register_script(self, text: str) -> Callable[..., Any]:
        async def run(keys: Sequence[str], args: Sequence[Any]) -> Any:
            return self._server.run(text, keys, args)

        return run

    async def smembers(self, key: str) -> set[bytes]:
        return self._server.call(lambda: {name.encode() for name in self._server.data.get(key, ())})

    async def mget(self, keys: Sequence[str]) -> list[Any]:
        return self._server.call(lambda: [self._server.data.get(key) for key in keys])

    async def hmget(self, key: str, fields: Sequence[str]) -> list[Any]:
        found = self._server.call(lambda: dict(self._server.data.get(key, {})))
        return [None if found.get(field) is None else found[field].encode() for field in fields]

    async def hget(self, key: str, field: str) -> Any:
        return (await self.hmget(key, [field]))[0]

    async def xread(self, cursors: dict[bytes, str], count: int, block: int = 0) -> Any:
        return self._server.call(lambda: self._server.read_streams(cursors, count))

    async def aclose(self) -> None:
        pass


def _key(worker: str, part: str) -> str:
    return lease.redis_key("memory", worker, part)


def _number(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))


def _newest(data: dict[str, Any], keys: Sequence[str]) -> int:
    return int(data.get(keys[0], "0"))


def _fenced(script: Callable[..., Any]) -> Callable[..., Any]:
    def run(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any]) -> Any:
        newest = _newest(data, keys)
        return newest if newest > int(args[0]) else script(data, keys, args, newest)

    return run


def _bucket(args: Sequence[Any], name: str, tier: object, key: bytes) -> str:
    return f"{args[1]}{name}:{tier}:{key[0] % 4}"


def _drop(data: dict[str, Any], args: Sequence[Any], name: str | None) -> None:
    for key in [key for key in data if name and key.startswith(f"{args[1]}{name}:")]:
        del data[key]


def _append(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any]) -> None:
    stream = data.setdefault(keys[2], {})
    entry = f"{args[0]}-{args[2]}"
    if stream and _number(entry) <= max(map(_number, stream)):
        raise redis.ResponseError("the id is smaller than the newest")
    stream[entry] = args[4]


def _publish(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any], newest: int) -> Any:
    meta = data.get(keys[1], {})
    if (meta.get("epoch"), meta.get("seq"), meta.get("set")) != (args[0], args[3], args[6]):
        return -1
    _append(data, keys, args)
    for kind, blob in zip(args[7::2], args[8::2], strict=True):
        letter, tier = kind[:1], int(kind[1:])
        if letter == b"C":
            _drop(data, args, meta["set"])
        for key in (blob[at : at + 16] for at in range(0, len(blob), 16)):
            if letter != b"R":
                data.setdefault(_bucket(args, meta["set"], tier, key), set()).add(key)
            if letter != b"S":
                gone_from = tier if letter == b"R" else 1 - tier
                data.get(_bucket(args, meta["set"], gone_from, key), set()).discard(key)
    meta["seq"] = args[2]
    return newest


def _probe(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any], newest: int) -> Any:
    meta = data.get(keys[1], {})
    if meta.get("epoch") != args[0]:
        return [newest, b"", b""]
    return [newest, meta.get("seq", "").encode(), meta.get("set", "").encode()]


def _begin(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any], newest: int) -> Any:
    meta = data.get(keys[1], {})
    _drop(data, args, meta.get("pending"))
    if meta.get("epoch") != args[0] or int(meta.get("seq", "0")) >= int(args[2]):
        _drop(data, args, meta.get("set"))
        data.pop(keys[1], None)
        data.pop(keys[2], None)
    data.setdefault(keys[1], {}).update(epoch=args[0], pending=args[3], pending_buckets=args[4])
    return newest


def _add(data: dict[str, Any], names: Sequence[str], args: Sequence[Any], newest: int) -> Any:
    if data.get(names[1], {}).get("pending") != args[3]:
        return -1
    for key in (keys[at : at + 16] for keys in args[5:] for at in range(0, len(keys), 16)):
        data.setdefault(_bucket(args, args[3], args[4], key), set()).add(key)
    return newest


def _commit(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any], newest: int) -> Any:
    meta = data.get(keys[1], {})
    if meta.get("pending") != args[3]:
        return -1
    _append(data, keys, args)
    old = meta.get("set")
    meta.update(set=meta.pop("pending"), buckets=meta.pop("pending_buckets"), seq=args[2])
    _drop(data, args, old)
    return newest


def _read(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any]) -> Any:
    meta, base, name, tier, first, last = args
    if data.get(meta, {}).get("set") != name:
        return None
    return b"".join(b"".join(data.get(f"{base}{name}:{tier}:{at}", ())) for at in range(int(first), int(last) + 1))


def _renew(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any]) -> Any:
    if (newest := _newest(data, keys)) > int(args[0]):
        return newest
    data[keys[0]], data[keys[1]] = args[0], args[1]
    data.setdefault(args[4], set()).add(args[3])
    return int(args[0])


def _release(data: dict[str, Any], keys: Sequence[str], args: Sequence[Any]) -> Any:
    if (newest := _newest(data, keys)) <= int(args[0]):
        data.pop(keys[1], None)
    return newest


_SCRIPTS = {
    redis_scripts.FENCE + redis_scripts.PUBLISH: _fenced(_publish),
    redis_scripts.FENCE + redis_scripts.PROBE: _fenced(_probe),
    redis_scripts.FENCE + redis_scripts.BEGIN: _fenced(_begin),
    redis_scripts.FENCE + redis_scripts.ADD: _fenced(_add),
    redis_scripts.FENCE + redis_scripts.COMMIT: _fenced(_commit),
    redis_scripts.READ: _read,
    lease._RENEW: _renew,
    lease._RELEASE: _release,
}
