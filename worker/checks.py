"""What can be known to be wrong with a worker's settings before a model is loaded.

Knows settings and the model folder's `config.json`; loads no torch. Every finding is one `ConfigError` naming its flag.
"""

from __future__ import annotations

from pathlib import Path

from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker.models.config import read_config


def check_settings(settings: WorkerSettings) -> None:
    """Raises `ConfigError` on settings that no worker can have, whatever its model."""
    for name in ("block_size", "max_batch_tokens", "max_sequences"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more")
    if settings.redis and not 0 < settings.heartbeat_s < settings.lease_ttl_s:
        raise ConfigError("--heartbeat-s must be above 0 and below --lease-ttl-s")
    for name in ("cpu_blocks", "window", "sinks"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be 0 or more")
    if settings.sinks and not settings.window:
        raise ConfigError("sinks are kept beside a window: --sinks needs --window")
    check_kv(settings)
    if settings.deterministic == "on" and settings.cpu_kv_dtype != "same":
        raise ConfigError("--cpu-kv-dtype int8 changes what comes back from the CPU: not beside --deterministic on")
    room = settings.device_blocks * settings.block_size
    if 0 < room < settings.max_model_len and not settings.window:
        raise ConfigError(f"--max-model-len {settings.max_model_len} is over the {room} positions of --device-blocks")


def check_kv(settings: WorkerSettings) -> None:
    """Raises `ConfigError` when KV would be converted twice."""
    if settings.cpu_kv_dtype != "same" and settings.kv_dtype != "auto":
        raise ConfigError("--cpu-kv-dtype is for KV that the device keeps as it is: not beside --kv-dtype")


def check_model(settings: WorkerSettings, folder: Path) -> None:
    """Raises `ConfigError` when the model in `folder` cannot be served with these settings."""
    if settings.runner == "simulated":
        from worker.simulated_runner import load_simulated_runner  # takes any model's folder

        load_simulated_runner(settings).close()
        return
    try:
        config = read_config(folder)
    except ConfigError as error:
        raise ConfigError(f"--model {settings.model}: {error.message}") from error
    check_length(settings, config.max_positions)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"--model {settings.model}: the folder has no weights in .safetensors files")


def check_length(settings: WorkerSettings, own: int) -> None:
    """Raises `ConfigError` when sequences may become longer than `own`, the positions that the model knows."""
    if settings.max_model_len > own and not settings.window:
        raise ConfigError(f"--max-model-len {settings.max_model_len} is over the model's own {own}")
