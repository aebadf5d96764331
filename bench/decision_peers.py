"""The same decision by other routers' own parts, where they are installed: optional, imported by name, never needed.

Knows nothing of Pando. Invariant: a peer that is not there, or does not work, is left out of the comparison.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

Times = list[float]
"""Seconds of wall clock: a peer may compute in threads of its own."""


def measured(prompts: Sequence[array[int]], block_size: int, rounds: int) -> dict[str, Times]:
    """By peer, the times of so many decisions over eight workers."""
    found: dict[str, Times] = {}
    for name, peer in _PEERS.items():
        try:
            found[name] = peer(prompts, block_size, rounds)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
            continue
    return found


def _dynamo(prompts: Sequence[array[int]], block_size: int, rounds: int) -> Times:
    """Select and reserve in its Rust service, called from Python; its index is empty, which is the fast case."""
    service = importlib.import_module("dynamo.llm").SelectionService()

    async def run() -> Times:
        for worker in range(8):
            await service.upsert_worker(
                {
                    "worker_id": worker + 1,
                    "model_name": "bench",
                    "endpoint": f"http://127.0.0.1:{7000 + worker}",
                    "block_size": block_size,
                    "kv_events_endpoints": {0: f"tcp://127.0.0.1:{6900 + worker}"},
                    "total_kv_blocks": 8192,
                }
            )
        return [await _selected(service, str(number), prompts) for number in range(rounds)]

    try:
        return asyncio.run(run())
    finally:
        service.shutdown()


async def _selected(service: Any, name: str, prompts: Sequence[array[int]]) -> float:
    prompt = prompts[int(name) % len(prompts)].tolist()
    began = time.perf_counter()
    await service.select_and_reserve({"model_name": "bench", "token_ids": prompt, "selection_id": name})
    took = time.perf_counter() - began
    await service.free_reservation(name)
    return took


def _ray_tree(prompts: Sequence[array[int]], block_size: int, rounds: int) -> Times:
    """Match, take the first that matches, insert; without the call to the actor that has the tree."""
    module = importlib.import_module("ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree")
    tree = module.PrefixTree()
    workers = [f"worker-{number}" for number in range(8)]
    tree.add_tenants(workers, 0.0)
    # Text of about four characters a token.
    texts = ["".join(f"{token % 10_000:04}" for token in prompt) for prompt in prompts]
    for number, text in enumerate(texts):
        tree.insert(text[: len(text) * 7 // 8], workers[number % 8], float(number))
    times = []
    for number in range(rounds):
        text = texts[number % len(texts)]
        began = time.perf_counter()
        _, matching = tree.prefix_match(text, workers)
        tree.insert(text, (matching or workers)[0], float(len(texts) + number))
        times.append(time.perf_counter() - began)
    return times


_PEERS: dict[str, Callable[[Sequence[array[int]], int, int], Times]] = {
    "ai-dynamo-runtime SelectionService, select and reserve": _dynamo,
    "Ray Serve LLM PrefixTree, match and insert": _ray_tree,
}
