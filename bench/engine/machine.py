"""What the machine can do, measured in the same run as what is held against it: bytes read and operations a second."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = 512 << 20
MATRIX = 2048
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """`read_gb_s`: GB/s of a product of a matrix far larger than any cache with one vector, as in decoding, or on CUDA
    of a copy, read and written. `matmul_gflop_s`: of a large product in the run's dtype."""

    name: str
    threads: int
    torch_version: str
    dtype: str
    read_gb_s: float
    matmul_gflop_s: float
    load_average: float


def measure_machine(device: str, dtype: torch.dtype, threads: int) -> Machine:
    """Takes some seconds; `threads` of the CPU, as what is measured has."""
    name = str(dtype).removeprefix("torch.")
    load = os.getloadavg()[0]
    if device == "cuda":
        from bench.kernels.timing import measure_roofline

        found = measure_roofline()
        return Machine(found.device, threads, torch.__version__, name, found.copy / 1e3, found.matmul / 1e3, load)
    torch.set_num_threads(threads)
    return Machine(processor(), threads, torch.__version__, name, _read_gb_s(dtype), _matmul_gflop_s(dtype), load)


def _read_gb_s(dtype: torch.dtype) -> float:
    """The best of both ways to read: kernels for one row differ by dtype."""
    width = 4096
    matrix = torch.ones(READ_BYTES // dtype.itemsize // width, width, dtype=dtype)
    vector = torch.ones(width, dtype=dtype)
    whole = matrix.view(torch.int32)
    seconds = min(_seconds(lambda: matrix @ vector), _seconds(whole.sum))
    return matrix.nbytes / seconds / 1e9


def _matmul_gflop_s(dtype: torch.dtype) -> float:
    left, right = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / _seconds(lambda: left @ right) / 1e9


def _seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
