"""Other projects' prefix indexes under the workload of `bench.index`, where they happen to be installed.

Nothing here is a dependency: what cannot be imported is left out and named. Each peer gets what its interface takes.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.index_load import Fleet, best_of

Row = dict[str, float | int | str]

_EVENT_BLOCKS = 512


def measure(fleet: Fleet) -> tuple[list[Row], list[str]]:
    """One row for each peer that is there, and the names of those that are absent."""
    rows: list[Row] = []
    absent: list[str] = []
    for name, run in (("ai-dynamo-runtime RadixTree", _dynamo), ("Ray PrefixTree", _ray)):
        row = run(name, fleet)
        if row is None:
            absent.append(name)
        else:
            rows.append(row)
    return rows, absent


def _load(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def _dynamo(name: str, fleet: Fleet) -> Row | None:
    """64-bit hashes of blocks; a worker's blocks arrive as JSON events."""
    make = _load("dynamo._core", "RadixTree")
    if make is None:
        return None
    tree = make()
    events = [
        (worker, payload) for worker, chains in enumerate(fleet.chains_of) for chain in chains
        for payload in _stored_events(chain)
    ]  # fmt: skip
    began = time.perf_counter()
    for worker, payload in events:
        tree.apply_event(worker, payload)
    query = _hashes(fleet.query)
    found = tree.find_matches(query).scores  # answers after all events: one thread takes both
    took = time.perf_counter() - began
    depths = sorted({int(depth) for depth in found.values()})
    assert depths == fleet.depths(), (depths, fleet.depths())
    return _row(name, fleet, lambda: tree.find_matches(query).scores, fleet.num_blocks / took / 1e6)


def _ray(name: str, fleet: Fleet) -> Row | None:
    """Text in place of blocks: a character stands for a block. It finds one depth, that of the best workers."""
    module = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree"
    make = _load(module, "PrefixTree")
    if make is None:
        return None
    tree = make()
    letters: dict[bytes, str] = {}
    tree.add_tenants([str(worker) for worker in range(len(fleet.chains_of))], 0.0)
    texts = [
        (str(worker), _text(chain, letters)) for worker, chains in enumerate(fleet.chains_of) for chain in chains
    ]  # fmt: skip
    began = time.perf_counter()
    for worker, text in texts:
        tree.insert(text, worker, 0.0)
    took = time.perf_counter() - began
    query = _text(fleet.query, letters)
    assert len(tree.prefix_match(query)[0]) == max(fleet.depths())
    return _row(name, fleet, lambda: tree.prefix_match(query), fleet.num_blocks / took / 1e6)


def _row(name: str, fleet: Fleet, match: Callable[[], Any], stored: float) -> Row:
    us = best_of(match) * 1e6
    return {"index": name, "workers": len(fleet.chains_of), "shape": fleet.shape, "match us": round(us, 1),
            "M blocks/s": round(stored, 2)}  # fmt: skip


def _hashes(chain: Sequence[bytes]) -> list[int]:
    return [int.from_bytes(key[:8], "little") >> 1 for key in chain]


def _stored_events(chain: Sequence[bytes]) -> list[bytes]:
    hashes = _hashes(chain)
    found = []
    for first in range(0, len(hashes), _EVENT_BLOCKS):
        blocks = [{"block_hash": value, "tokens_hash": value} for value in hashes[first : first + _EVENT_BLOCKS]]
        stored = {"parent_hash": hashes[first - 1] if first else None, "blocks": blocks}
        found.append(json.dumps({"event_id": first, "data": {"stored": stored}, "dp_rank": 0}).encode())
    return found


def _text(chain: Sequence[bytes], letters: dict[bytes, str]) -> str:
    return "".join(letters.setdefault(key, chr(0x4E00 + len(letters) % 0x5000)) for key in chain)
