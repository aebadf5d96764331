"""What the commands say to mistakes: one line on stderr, an exit code, soon, and no process left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from control.children import adopt_orphans, descendants, source_path
from pando.model_folder import resolve_model

FREE_PORTS = ["--port", "0", "--http-port", "0", "--admin-port", "0"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float
    left: list[int]


def pando(*argv: str, env: dict[str, str] | None = None) -> Outcome:
    """Run the command line; `left` are processes it started and that outlived it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PANDO_")}
    adopt_orphans()
    before = frozenset(descendants())
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pando.cli", *argv],
        env=kept | {"PYTHONPATH": source_path()} | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = time.monotonic() - began
    left = [pid for pid in descendants() if pid not in before]
    return Outcome(done.returncode, done.stdout, done.stderr, seconds, left)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """Makes a model folder from pando-tiny, with fields of its config changed and files left out or overwritten."""

    def made(fields: dict[str, object] | None = None, **files: str) -> str:
        source = resolve_model("pando-tiny")
        config = json.loads((source / "config.json").read_text("utf-8"))
        for path in source.glob("*.json"):
            (tmp_path / path.name).write_text(files.get(path.stem, path.read_text("utf-8")), "utf-8")
        (tmp_path / "config.json").write_text(files.get("config", json.dumps(config | (fields or {}))), "utf-8")
        return str(tmp_path)

    return made


@pytest.fixture
def bad_model(tmp_path: Path) -> str:
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


def refused(outcome: Outcome, command: str, says: str, code: int = 2) -> None:
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith(f"pando {command}: ") and says in outcome.err
    assert (outcome.code, outcome.out, outcome.left) == (code, "", [])
    assert outcome.seconds < 10  # 5 s on a quiet machine


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["up", "--no-such-option"], "--no-such-option"),
        (["up", "--work", "2"], "--work"),
        (["up", "--workers", "two"], "whole number"),
        (["up", "--workers", "0"], "at least 1"),
        (["up", "--prefix-cache", "maybe"], "maybe"),
        (["up", "--model", "/no/such/folder"], "/no/such/folder"),
        (["up", "--port", "99999"], "99999"),
        (["up", "--port", "8000", "--http-port", "8000"], "differ"),
        (["up", "--host", "0.0.0.0", *FREE_PORTS], "--tenants"),
        (["up", "--tenants", "/no/such/tenants.toml", *FREE_PORTS], "/no/such/tenants.toml"),
        (["up", "--host", "127.0.0.300", *FREE_PORTS[2:]], "127.0.0.300"),
        (["up", "--redis", "127.0.0.1:6379", *FREE_PORTS], "redis://"),
        (["up", "--ray", "127.0.0.1:1", *FREE_PORTS], "--redis"),
        (["up", "--block-size", "0", *FREE_PORTS], "--block-size must be 1 or more"),
        (["up", "--sinks", "5", *FREE_PORTS], "--sinks needs --window"),
        (["up", "--max-model-len", "999999", *FREE_PORTS], "--max-model-len 999999 is over the model's own"),
        (["up", "--max-model-len", "999999", "--runner", "simulated", *FREE_PORTS], "--max-model-len 999999"),
        (["up", "--max-model-len", "100", "--device-blocks", "2", *FREE_PORTS], "32 positions of --device-blocks"),
        (["up", "--link-token", "with space", *FREE_PORTS], "link token"),
        (["up", "--config", "/no/such/file.toml"], "/no/such/file.toml"),
        (["workers"], "--redis"),
        (["workers", "--redis", "redis://127.0.0.1:1"], "does not answer"),
        (["workers", "--redis", "redis://127.0.0.1:1", "--host", "0.0.0.0"], "PANDO_LINK_TOKEN"),
        (["workers", "--redis", "redis://127.0.0.1:1", "--block-size", "0"], "--block-size"),
        (["workers", "--workers", "0", "--redis", "redis://127.0.0.1:1"], "at least 1"),
        (["demo", "--model", "/no/such/folder"], "/no/such/folder"),
        (["router", "--frobnicate"], "--frobnicate"),
        (["generate"], "text"),
        (["generate", "hello", "--max-tokens", "x"], "--max-tokens"),
        (["generate", "hello", "--api-key", "k", "--tenant", "t"], "not allowed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_on_the_command_line(argv: list[str], says: str) -> None:
    refused(pando(*argv), argv[0], says)


def test_an_unknown_command_and_none() -> None:
    outcome = pando("frobnicate")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and "frobnicate" in outcome.err
    assert pando().code == 0


def test_a_folder_that_is_no_model(bad_model: str) -> None:
    refused(pando("up", "--model", bad_model, *FREE_PORTS), "up", bad_model)


@pytest.mark.parametrize(
    ("fields", "files", "says"),
    [
        ({"architectures": ["BertModel"]}, {}, "architecture BertModel is not supported"),
        ({}, {"config": '{"name": "someone"}'}, "config.json names no architecture"),
        ({}, {"config": "not JSON"}, "config.json of the model folder is not JSON"),
        ({}, {}, "no weights"),
    ],
    ids=["unsupported", "foreign", "broken", "without weights"],
)
def test_a_model_that_no_worker_serves(
    model: Callable[..., str], fields: dict[str, object], files: dict[str, str], says: str
) -> None:
    refused(pando("up", "--model", model(fields, **files), *FREE_PORTS), "up", says)


def test_a_router_that_cannot_start_ends_the_command(model: Callable[..., str]) -> None:
    broken = model(tokenizer="{}")
    outcome = pando("up", "--json", "--runner", "simulated", "--model", broken, *FREE_PORTS)
    assert (outcome.code, outcome.out, outcome.left) == (2, "", [])
    assert outcome.err.count("\n") == 1 and "tokenizer.json" in outcome.err, outcome.err
    assert outcome.seconds < 15  # it does not wait for Ray


@pytest.mark.parametrize("flag", ["--port", "--http-port", "--admin-port"])
def test_a_port_that_is_taken(taken_port: int, flag: str) -> None:
    others = [part for name in ("--port", "--http-port", "--admin-port") if name != flag for part in (name, "0")]
    refused(pando("up", flag, str(taken_port), *others), "up", str(taken_port))


def test_a_redis_that_does_not_answer(free_port: Callable[[], int]) -> None:
    url = f"redis://user:hunter2@127.0.0.1:{free_port()}/0"
    outcome = pando("up", "--redis", url, *FREE_PORTS)
    refused(outcome, "up", "does not answer")
    assert "hunter2" not in outcome.err


def test_a_model_without_a_tokenizer(model: Callable[..., str]) -> None:
    folder = model()
    Path(folder, "tokenizer.json").unlink()
    outcome = pando("up", "--runner", "simulated", "--model", folder, *FREE_PORTS)
    refused(outcome, "up", "no tokenizer.json")


def test_a_setting_in_the_environment_that_there_is_not() -> None:
    outcome = pando("up", *FREE_PORTS, env={"PANDO_WORKERZ": "2"})
    refused(outcome, "up", "PANDO_WORKERZ")


@pytest.mark.parametrize("argv", [["generate", "hi"], ["status"], ["health"]], ids=lambda argv: argv[0])
def test_nothing_listens_there(argv: list[str], free_port: Callable[[], int]) -> None:
    outcome = pando(*argv, "--target", f"127.0.0.1:{free_port()}", "--timeout", "2")
    refused(outcome, argv[0], "", code=1)


@pytest.mark.parametrize("command", ["up", "router", "workers", "generate", "chat", "status", "demo", "health"])
def test_every_command_explains_itself(command: str) -> None:
    outcome = pando(command, "--help")
    assert outcome.code == 0 and outcome.err == ""
    assert f"usage: pando {command}" in outcome.out and outcome.out.count("--") > 3
    assert "PANDO_" in outcome.out


def test_a_ray_that_does_not_answer(redis_url: str, free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{free_port()}"
    refused(pando("workers", "--redis", redis_url, "--ray", address), "workers", f"no Ray answers at {address}")
