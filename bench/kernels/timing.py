"""Times on a CUDA device: replays of a recorded graph, events around them, the median; and what the device can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SECONDS = 0.12  # spent on one figure


def graph_microseconds(run: Callable[[int], object], count: int) -> float:
    """Microseconds of one of `run(0)` to `run(count - 1)`, recorded one after the other."""
    for index in range(min(count, 2)):
        run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(index) for index in range(count)]
    for _ in range(2):
        graph.replay()
    first = _event_ms(graph.replay)
    repeats = min(60, max(5, int(SECONDS * 1e3 / max(first, 1e-3))))
    median = statistics.median(_event_ms(graph.replay) for _ in range(repeats))
    del kept
    return median * 1e3 / count


def host_microseconds(run: Callable[[], object], repeats: int = 15) -> float:
    """Median time of a call on the host."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Measured: bytes a microsecond that a copy moves (read and written), operations a microsecond of a bf16 matmul."""

    device: str
    copy: float
    matmul: float
    launch: float  # microseconds of one more tiny launch in a graph

    def floor(self, moved: int, operations: int) -> float:
        return max(moved / self.copy, operations / self.matmul)


def measure_roofline() -> Roofline:
    return Roofline(torch.cuda.get_device_name(), _copy_rate(), _matmul_rate(), _launch_microseconds())


def _copy_rate() -> float:
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    milliseconds = statistics.median(_event_ms(lambda: target.copy_(source)) for _ in range(9))
    return 2 * source.numel() * source.itemsize / (milliseconds * 1e3)


def _matmul_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / graph_microseconds(lambda _: a @ b, 3)


def _launch_microseconds() -> float:
    one = torch.zeros(1, device="cuda")
    return graph_microseconds(lambda _: one.add_(1), 200)


def _event_ms(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
