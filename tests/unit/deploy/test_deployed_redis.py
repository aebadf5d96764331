"""The Redis of the chart and of compose, started literally: who may enter, what routers and workers may do there."""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen, run
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from kvstore.block import WorkerId
from kvstore.lease import LeaseKeeper, connect, redis_key, take_epoch
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from kvstore.redis_url import why_no_answer
from pando.settings import CrewSettings, RouterSettings, WorkerSettings, narrow
from router.prefix_catalog import PrefixCatalog
from router.prefix_registry import PrefixRegistry
from router.prefix_seal import PrefixSeal
from tests.conftest import redis_server_binary
from tests.service.test_prefix_registry import nothing, record
from tests.service.test_redis_access import limit_and_tell, supports_tls, version
from tests.service.test_redis_index import CLUSTER, FAST, Life, until
from tests.unit.deploy.test_compose import BASE, compose

Environment = dict[str, str]
TENANTS = {"tenants": {"existingSecret": "t"}}
FILES = ("redis.conf", "start.sh", "users.sh", "users.acl")
WORKERS = ("worker-0", "worker-1")


@dataclass(frozen=True)
class Given:
    """What a way to deploy gives to Redis, the router and the control process."""

    command: list[str]
    files: dict[str, str]
    redis: Environment
    router: RouterSettings
    crew: CrewSettings
    certificates: dict[str, str]

    @property
    def password(self) -> str:
        return self.redis["REDIS_PASSWORD"]


def of_chart(render: Callable[..., Any], parse_pando: Callable[..., Any], **redis: Any) -> Given:
    """What the chart renders, with what the cluster fills in: references to Secrets and to other variables."""
    release = render({"cluster": CLUSTER, "redis": redis} | TENANTS)
    secrets = {
        d["metadata"]["name"]: {k: base64.b64decode(v).decode() for k, v in d["data"].items()}
        for d in release.kind("Secret")
    }

    def environment(container: dict[str, Any]) -> Environment:
        found: Environment = {}
        for entry in container["env"]:
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            value = secrets[reference["name"]][reference["key"]] if reference else entry.get("value", "pod")
            found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
        return found

    server, router, control = (release.pod(name)["spec"]["containers"][0] for name in ("redis", "router", "control"))
    (config,) = release.kind("ConfigMap")
    return Given(
        [*server["command"], *server["args"]],
        config["data"],
        environment(server),
        parse_pando(router["args"], environment(router)),
        parse_pando(control["args"][1:], environment(control)),
        secrets.get("demo-pando-redis-tls", {}),
    )


def of_compose(root: Path, parse_pando: Callable[..., Any]) -> Given:
    """What the compose engine makes of the file, in a fleet that has the name of the tests."""
    document = json.loads(compose(root, BASE, "config", "--format", "json").stdout)
    services, configs = document["services"], document["configs"]
    server, router, control = services["redis"], services["router-1"], services["control"]
    files = {
        Path(mount["target"]).name: Path(configs[mount["source"]]["file"]).read_text() for mount in server["configs"]
    }
    return Given(
        server["command"],
        files,
        server["environment"] | {"CLUSTER": CLUSTER},
        parse_pando(router["command"], router["environment"]),
        parse_pando(control["command"][1:], control["environment"]),
        {},
    )


@dataclass(frozen=True)
class Deployed:
    """A running Redis and how its clients reach it."""

    given: Given
    port: int
    ca: str

    @property
    def router(self) -> str:
        return self._here(self.given.router)

    def worker(self, name: str) -> str:
        return self._here(narrow(WorkerSettings, self.given.crew, worker_id=name))

    def _here(self, settings: RouterSettings | WorkerSettings) -> str:
        """The URL that the process would use, at the server of the test."""
        url = re.sub(r"@[^/]+/", f"@127.0.0.1:{self.port}/", settings.redis)
        changes = {"redis": url} | ({"redis_ca": self.ca} if settings.redis_ca else {})
        return narrow(type(settings), settings, **changes).redis_url


@contextmanager
def started(given: Given, folder: Path, port: int) -> Iterator[Deployed]:
    """The container's command with the container's files and variables, its paths moved to `folder`."""
    for name, text in given.files.items():
        old = name == "users.acl" and version() < 7  # before, a key is both read and written
        (folder / name).write_text(re.sub(r"%[RW]+~", "~", text) if old else text)
    for name, text in given.certificates.items():
        (folder / name).write_text(text)
    moved = {"REDIS_CONF": str(folder / "redis.conf"), "REDIS_AUTH_FILE": str(folder / "auth.conf")}
    if tls := given.redis.get("REDIS_TLS_FOLDER"):
        moved |= {"REDIS_TLS_FOLDER": str(folder), "REDIS_PORT": str(port)}
    at = [] if tls else ["--port", str(port)]
    command = [part.replace("/etc/pando-redis", str(folder)) for part in given.command]
    path = f"{Path(redis_server_binary()).parent}:{os.environ['PATH']}"
    environment = given.redis | moved | {"PATH": path}
    process = Popen([*command, *at, "--bind", "127.0.0.1", "--dir", str(folder)], env=environment, stdout=DEVNULL)
    deployed = Deployed(given, port, str(folder / "ca.crt"))
    try:
        for _ in range(250):
            if not why_no_answer(deployed.router, 0.5):
                break
            time.sleep(0.02)
        yield deployed
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(params=["chart", "compose"])
def deployed(
    request: pytest.FixtureRequest,
    root: Path,
    render: Callable[..., Any],
    parse_pando: Callable[..., Any],
    tmp_path: Path,
    free_port: Callable[[], int],
) -> Iterator[Deployed]:
    given = of_chart(render, parse_pando) if request.param == "chart" else of_compose(root, parse_pando)
    with started(given, tmp_path, free_port()) as found:
        yield found


def test_the_password_of_health_checks_is_good_for_nothing_else(deployed: Deployed) -> None:
    at = f"127.0.0.1:{deployed.port}/0"
    assert why_no_answer(f"redis://:{deployed.given.password}@{at}") == ""
    with connect(f"redis://:{deployed.given.password}@{at}") as client, pytest.raises(NoPermissionError):
        client.get("x")
    for user in ("router", *WORKERS):
        with connect(f"redis://{user}:{deployed.given.password}@{at}") as client, pytest.raises(AuthenticationError):
            client.ping()
    written = Path(deployed.ca).parent / "auth.conf.users"
    assert written.stat().st_mode & 0o077 == 0 and deployed.given.password not in written.read_text()


def test_as_many_workers_as_the_fleet_has_are_users(deployed: Deployed) -> None:
    assert deployed.given.crew.workers == len(WORKERS)
    assert [why_no_answer(deployed.worker(name)) for name in WORKERS] == ["", ""]
    assert "refused the password" in why_no_answer(deployed.worker("worker-2"))


@pytest.mark.asyncio
async def test_each_part_can_do_its_work(deployed: Deployed) -> None:
    life = Life(deployed.worker("worker-0"), "worker-0")
    assert life.beat() and life.store(1, 2, 3)
    index = MemoryIndex()
    mirror = Mirror(deployed.router, CLUSTER, index, times=FAST)
    await mirror.start()
    client = redis.asyncio.Redis.from_url(deployed.router)
    registry = PrefixRegistry(client, CLUSTER, PrefixSeal(b"secret", CLUSTER), PrefixCatalog(), model="m")
    try:
        await until(lambda: index.num_blocks(WorkerId("worker-0")) == 3)
        await registry.start()
        await registry.put(record(1), 60, nothing)
        await limit_and_tell(deployed.router)
        for name in ("ids", record(1).id):
            _refused(deployed.worker("worker-0"), ["SMEMBERS", f"{CLUSTER}:{{prefixes}}:{name}"])
            _refused(deployed.worker("worker-0"), ["GET", f"{CLUSTER}:{{prefixes}}:{name}"])
    finally:
        await registry.stop()
        await client.aclose()
        await mirror.stop()
        life.client.close()


def test_no_part_can_do_anothers_work(deployed: Deployed) -> None:
    other = Life(deployed.worker("worker-1"), "worker-1")
    assert other.beat() and other.store(1)
    with connect(deployed.worker("worker-0")) as client:
        with pytest.raises(NoPermissionError):
            take_epoch(client, CLUSTER, "worker-1")
        with pytest.raises(ResponseError):
            LeaseKeeper(client, CLUSTER).release("worker-1", other.epoch)
    _refused(
        deployed.worker("worker-0"), ["SET", f"{CLUSTER}:secret-check", "x"], ["ACL", "LIST"], ["CONFIG", "GET", "*"]
    )
    stolen = [["XADD", redis_key(CLUSTER, "worker-1", "events"), "*", "b", "x"]]
    stolen.append(["INCRBY", redis_key(CLUSTER, "worker-1", "epoch"), "1"])
    if version() >= 7:
        stolen += [
            ["SET", redis_key(CLUSTER, "worker-1", "epoch"), "9"],
            ["DEL", redis_key(CLUSTER, "worker-1", "meta")],
        ]
    _refused(deployed.router, *stolen)
    assert other.beat() and other.writer.snapshots == 1
    other.client.close()


def _refused(url: str, *commands: list[str]) -> None:
    with connect(url) as client:
        for command in commands:
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)


def test_one_password_for_all_when_users_are_off(
    render: Callable[..., Any], parse_pando: Callable[..., Any], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    given = of_chart(render, parse_pando, users=False)
    with started(given, tmp_path, free_port()) as deployed:
        assert why_no_answer(deployed.router) == why_no_answer(deployed.worker("worker-7")) == ""
        assert why_no_answer(f"redis://router:{given.password}@127.0.0.1:{deployed.port}/0") != ""


def test_tls_of_the_chart_with_the_ca_that_it_makes(
    render: Callable[..., Any], parse_pando: Callable[..., Any], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    given = of_chart(render, parse_pando, tls={"enabled": True})
    assert set(given.certificates) == {"ca.crt", "tls.crt", "tls.key"}
    assert given.router.redis.startswith("rediss://router:") and given.crew.redis.startswith("rediss://{worker_id}:")
    if not supports_tls(tmp_path):
        pytest.skip(f"{redis_server_binary()} was built without TLS: put a redis-server that has it on PATH")
    with started(given, tmp_path, free_port()) as deployed:
        assert [why_no_answer(url) for url in (deployed.router, deployed.worker("worker-1"))] == ["", ""]
        assert why_no_answer(deployed.router.partition("?")[0]), "the system does not know this CA"
        assert why_no_answer(deployed.router.partition("?")[0].replace("rediss", "redis"))


@pytest.mark.parametrize("name", ["ROUTER_PASSWORD", "WORKER_PASSWORD"])
@pytest.mark.parametrize("password", ["with space", 'quo"te', "a@b", "a&b"])
def test_a_password_that_breaks_a_url_is_refused(root: Path, tmp_path: Path, name: str, password: str) -> None:
    given = {"REDIS_PASSWORD": "x", "ROUTER_PASSWORD": "y", "WORKER_PASSWORD": "z", "WORKERS": "1", "CLUSTER": "c"}
    environment = given | {name: password, "REDIS_AUTH_FILE": str(tmp_path / "auth"), "PATH": os.environ["PATH"]}
    done = run(
        ["sh", root / "deploy" / "redis" / "start.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and name in done.stderr and password not in done.stderr


@pytest.mark.parametrize("host", ["demo-pando-redis", "demo-pando-redis.prod.svc", "127.0.0.1"])
def test_the_certificate_of_the_chart_is_good_for_its_names(
    render: Callable[..., Any], parse_pando: Callable[..., Any], tmp_path: Path, host: str
) -> None:
    given = of_chart(render, parse_pando, tls={"enabled": True})
    for name, text in given.certificates.items():
        (tmp_path / name).write_text(text)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    assert _shakes_hands(server, client, host)
    with pytest.raises(ssl.SSLCertVerificationError):
        _shakes_hands(server, client, "elsewhere")
    with pytest.raises(ssl.SSLCertVerificationError):
        _shakes_hands(server, ssl.create_default_context(), host)


def _shakes_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> bool:
    """Whether the two agree, in memory; raises what the client finds wrong."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    for _ in range(10):
        for side in list(left):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            left.remove(side)
    return not left


# What is rendered


def test_the_files_are_those_that_compose_runs(root: Path, folder: Path, render: Callable[..., Any]) -> None:
    assert {path.name for path in (folder / "files").iterdir()} == {*FILES}
    assert {path.name for path in (root / "deploy" / "redis").iterdir()} == {*FILES}
    (config,) = render(TENANTS).kind("ConfigMap")
    assert set(config["data"]) == {*FILES}
    for name, text in config["data"].items():
        source = (root / "deploy" / "redis" / name).read_text()
        assert text.strip() == source.strip() and (folder / "files" / name).read_text() == source


def test_addresses(release: Any) -> None:
    for part, user in (("router", "router"), ("control", "{worker_id}")):
        (container,) = release.pod(part)["spec"]["containers"]
        names = [entry["name"] for entry in container["env"]]
        assert names.index("REDIS_PASSWORD") < names.index("PANDO_REDIS"), "a variable can refer to earlier ones only"
        url = next(entry["value"] for entry in container["env"] if entry["name"] == "PANDO_REDIS")
        outside = f"rediss://{user}:$(REDIS_PASSWORD)@redis.example.com:6380/0"
        assert url == (outside if release.case == "ha" else f"redis://{user}:$(REDIS_PASSWORD)@demo-pando-redis:6379/0")
        assert "PANDO_REDIS_CA" not in names, "the system knows the CA of the one outside"
    assert bool([d for d in release.kind("StatefulSet") if d["metadata"]["name"].endswith("-redis")]) == (
        release.case != "ha"
    )


def test_whole_urls_of_a_redis_elsewhere_come_from_the_secret(render: Callable[..., Any]) -> None:
    outside = {"mode": "external", "external": {"urls": True}}
    release = render({"redis": outside, "auth": {"existingSecret": "mine"}} | TENANTS)
    for part, key in (("router", "redis-router-url"), ("control", "redis-worker-url")):
        (container,) = release.pod(part)["spec"]["containers"]
        given = {entry["name"]: entry for entry in container["env"]}
        assert given["PANDO_REDIS"]["valueFrom"]["secretKeyRef"] == {"name": "mine", "key": key}
        assert "REDIS_PASSWORD" not in given


@pytest.mark.parametrize("mode", ["internal", "external"])
def test_who_uses_redis_by_tls_has_the_file_of_its_ca(render: Callable[..., Any], mode: str) -> None:
    outside = {"external": {"host": "r"}} if mode == "external" else {}
    redis_values = {"mode": mode, "tls": {"enabled": True, "existingSecret": "pki"}} | outside
    release = render({"redis": redis_values, "auth": {"existingSecret": "mine"}} | TENANTS)
    assert not release.kind("Secret"), "the certificates are given"
    for part in ("router", "control", "ray-worker"):
        spec = release.pod(part)["spec"]
        (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "redis-ca"]
        (volume,) = [v for v in spec["volumes"] if v["name"] == "redis-ca"]
        assert volume["secret"] == {"secretName": "pki", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        given = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
        assert part == "ray-worker" or given["PANDO_REDIS_CA"] == f"{mount['mountPath']}/ca.crt"
    if mode == "internal":
        (container,) = release.pod("redis")["spec"]["containers"]
        folder = next(entry["value"] for entry in container["env"] if entry["name"] == "REDIS_TLS_FOLDER")
        assert folder in [mount["mountPath"] for mount in container["volumeMounts"]]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert f"redis-cli --tls --cacert {folder}/ca.crt ping" in container[probe]["exec"]["command"][-1]
