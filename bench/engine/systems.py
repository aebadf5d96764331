"""Starts what is measured: our fleet with and without reuse, and the peers' servers, each a child that ends with us.

Knows command lines and how each says that it is ready; no workload.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.engine.gguf import write_gguf
from bench.engine.scenario import PREFILL_TOKENS, MultiTenant
from bench.process_fleet import process_fleet
from control.children import Child, Sweeper
from pando.errors import ConfigError
from pando.settings import RouterSettings, WorkerSettings

READY_TIMEOUT_S = 420.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What every system is started with. `kv_tokens` is room for KV; `length` the longest prompt and answer."""

    folder: Path
    dtype: str
    threads: int
    concurrency: int
    kv_tokens: int
    length: int
    device: str = "cpu"


def serving_for(settings: WorkerSettings, scenario: MultiTenant) -> Serving:
    """Room for all that is open at once, twice, and for the longest prompt."""
    answered = scenario.prompt_tokens + scenario.output_tokens
    length = max(answered, PREFILL_TOKENS) + 64
    return Serving(
        Path(settings.model), settings.dtype, settings.threads, scenario.concurrency,
        kv_tokens=2 * max(scenario.concurrency * (answered + settings.block_size), length),
        length=length, device=settings.device,
    )  # fmt: skip


@contextmanager
def swept_logs(target: Path) -> Iterator[Path]:
    """A folder for what peers say. Who writes there is killed when we end in whatever way, paused or not; what was
    written is in `target` when the block ends."""
    sweeper = Sweeper("pando-bench-peers-")
    try:
        yield sweeper.folder
    finally:
        shutil.copytree(sweeper.folder, target, dirs_exist_ok=True)
        sweeper.sweep()


@contextmanager
def pando_fleets(serving: Serving, worker: WorkerSettings) -> Iterator[tuple[str, str]]:
    """The gRPC addresses of two fleets of one worker and one router: with reuse and without."""
    own = replace(
        worker,
        model=str(serving.folder),
        dtype=serving.dtype,
        device=serving.device,
        threads=serving.threads,
        device_blocks=serving.kv_tokens // worker.block_size,
        max_model_len=serving.length,
    )
    router = RouterSettings(model=own.model, block_size=own.block_size)
    with ExitStack() as parts:
        fleets = [
            parts.enter_context(process_fleet(replace(own, prefix_cache=word), 1, router, 1)) for word in ("on", "off")
        ]
        yield fleets[0].targets[0], fleets[1].targets[0]


@contextmanager
def vllm_server(python: Path, preload: str, serving: Serving, log: Path) -> Iterator[str]:
    """The URL of vLLM's server from its own environment; `preload` are libraries as in LD_PRELOAD."""
    port = _unused_port()
    flags = {
        "--model": str(serving.folder),
        "--served-model-name": "bench",
        "--dtype": serving.dtype,
        "--max-model-len": str(serving.length),
        "--max-num-seqs": str(serving.concurrency),
        "--host": "127.0.0.1",
        "--port": str(port),
    }
    environment = {
        "LD_PRELOAD": preload,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "OMP_NUM_THREADS": str(serving.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        *(part for pair in flags.items() for part in pair),
    ]
    with _server([*command, "--enable-prefix-caching"], port, log, environment) as url:
        yield url


@contextmanager
def llama_server(program: Path, serving: Serving, log: Path) -> Iterator[str]:
    """The URL of llama.cpp's server; the checkpoint is written as GGUF beside it, once."""
    model = serving.folder / f"model-{serving.dtype}.gguf"
    if not model.is_file():
        write_gguf(serving.folder, model, serving.dtype)
    port = _unused_port()
    kv = {"float32": "f32", "bfloat16": "bf16"}[serving.dtype]
    flags = {
        "--model": str(model),
        "--threads": str(serving.threads),
        "--parallel": str(serving.concurrency),
        "--ctx-size": str(serving.kv_tokens),
        "--cache-type-k": kv,
        "--cache-type-v": kv,
        "--flash-attn": "on",
        "--host": "127.0.0.1",
        "--port": str(port),
    }
    command = [str(program), *(part for pair in flags.items() for part in pair), "--kv-unified"]
    with _server(command, port, log, {}) as url:
        yield url


@contextmanager
def _server(command: list[str], port: int, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """A child that answers /health when it is ready; what it says goes to `log`."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shell = ["/bin/sh", "-c", 'exec "$@" >"$0" 2>&1', str(log), *command]
    child = Child(shell, env=kept | dict(environment))
    try:
        _wait_healthy(child, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.stop(grace_s=15.0)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a server's own children outlive it where it never came up


def _wait_healthy(child: Child, url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.exit_code() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2.0) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise ConfigError(f"a peer's server did not start; its log {log.name} says why")


def _unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
