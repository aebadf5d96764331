"""What each user of a fleet's Redis may do: its part, as the documentation lists it, and nothing else. And TLS."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import redis
import redis.asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.exceptions import NoPermissionError

from kvstore.block import WorkerId
from kvstore.events import BlocksStored
from kvstore.lease import LeaseKeeper, connect, redis_key, take_epoch
from kvstore.ledger import Ledger
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from kvstore.redis_index import RedisIndexWriter
from kvstore.redis_url import why_no_answer
from kvstore.scope import TenantId
from pando.settings import RouterSettings, WorkerSettings
from pando.v1 import admin_pb2, admin_pb2_grpc
from router.auth import key_hash
from router.limit_store import LimitStore
from router.limits import FleetLimits
from router.peers import PeerExchange, PeerLoads
from router.prefix_catalog import PrefixCatalog
from router.prefix_registry import PrefixRegistry
from router.prefix_seal import PrefixSeal
from router.process import SecretClaim
from router.tenants import Tenant
from tests.conftest import redis_server_binary
from tests.fleet_processes import Fleet, answers, line, some_tokens
from tests.fleet_processes import until as until_true
from tests.service.test_prefix_registry import nothing, record
from tests.service.test_redis_index import CLUSTER, FAST, Life, until

ROOT = Path(__file__).resolve().parents[2]
PASSWORDS = {"default": "health", "router": "r0uter", "w0": "first", "w1": "second", "admin": "adm1n"}
KEY = bytes(range(16))


def version() -> int:
    line = subprocess.run([redis_server_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\d+)", line)
    assert found is not None
    return int(found[1])


def acl_file(folder: Path) -> Path:
    """What `users.sh` prints, and an administrator for the test. Before Redis 7 a key is both read and written."""
    environment = {
        "PATH": os.environ["PATH"], "CLUSTER": CLUSTER, "DEFAULT_PASSWORD": PASSWORDS["default"],
        "ROUTER_PASSWORD": PASSWORDS["router"],
        "WORKER_PASSWORDS": " ".join(f"{name}={PASSWORDS[name]}" for name in ("w0", "w1")),
    }  # fmt: skip
    script = ROOT / "deploy" / "redis" / "users.sh"
    text = subprocess.run([script], env=environment, capture_output=True, text=True, check=True).stdout
    assert not any(password in text for password in PASSWORDS.values())
    if version() < 7:
        text = re.sub(r"%[RW]+~", "~", text)
    path = folder / "users.acl"
    path.write_text(text + f"user admin on >{PASSWORDS['admin']} ~* &* +@all\n")
    return path


class Server:
    """A Redis that knows the fleet's users; `url(user)` is theirs."""

    def __init__(self, port: int) -> None:
        self.port = port

    def url(self, user: str) -> str:
        return f"redis://{user}:{PASSWORDS[user]}@127.0.0.1:{self.port}/0"

    def client(self, user: str) -> Any:
        return connect(self.url(user))


def started(command: list[str], is_up: Callable[[], bool]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([redis_server_binary(), *command], stdout=subprocess.DEVNULL)
    for _ in range(250):
        if is_up():
            return process
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise RuntimeError("redis-server did not start")


@pytest.fixture
def server(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Server]:
    server = Server(free_port())
    command = ["--port", str(server.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = started(
        [*command, "--aclfile", str(acl_file(tmp_path))], lambda: not why_no_answer(server.url("default"), 0.2)
    )
    yield server
    process.terminate()
    process.wait(10)


@pytest.mark.asyncio
async def test_each_user_can_do_its_part(server: Server) -> None:
    life = Life(server.url("w0"), "w0")
    assert life.beat()
    index = MemoryIndex()
    mirror = Mirror(server.url("router"), CLUSTER, index, times=FAST)
    await mirror.start()
    try:
        life.store(1, 2, 3)
        life.remove(3)
        assert life.writer.publish_snapshot() and life.store(4)
        await until(lambda: index.num_blocks(WorkerId("w0")) == 3)
        assert mirror.connected and index.digest(WorkerId("w0")) == life.lease.digest
        claim = SecretClaim(server.url("router"), CLUSTER, b"secret")
        await claim.start()
        await claim.stop()
        client = redis.asyncio.Redis.from_url(server.url("router"))
        registry = PrefixRegistry(client, CLUSTER, PrefixSeal(b"secret", CLUSTER), PrefixCatalog(), model="m")
        await registry.start()
        await registry.put(record(1), 60, nothing)
        await registry.put(record(2), 60, nothing)
        await registry.delete(record(1))
        await registry.stop()
        await limit_and_tell(server.url("router"))
        life.keeper.release("w0", life.epoch)
        await until(lambda: not mirror.leases())
    finally:
        await mirror.stop()
        life.client.close()


async def limit_and_tell(url: str) -> None:
    """What routers count and say to each other."""
    client = redis.asyncio.Redis.from_url(url)
    store = LimitStore(client, CLUSTER, b"secret", router="r", ttl_s=5)
    limits = FleetLimits(store, clock=time.monotonic)
    await limits.start()
    tenant = Tenant(TenantId("a"), 2, requests_per_s=5.0)
    assert await limits.enter(tenant) == (0.0, 0.0)
    assert await store.lease(tenant.id, 2, used=1, wanted=1, routers=1) == 2
    loads = PeerLoads()
    peers = PeerExchange(client, CLUSTER, router="r", own=dict, loads=loads, clock=time.monotonic)
    await peers.start()
    await asyncio.sleep(0.2)
    assert await client.get(f"{CLUSTER}:router:r:sent")
    await peers.stop()
    await limits.stop()
    await client.aclose()


def documented() -> dict[str, set[str]]:
    """The table of users and commands in the operations page."""
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `(default|router|WORKER)` \|[^|]*\|([^|]*)\|", text, re.MULTILINE)
    return {user: set(re.findall(r"`([^`]+)`", commands)) for user, commands in rows}


@pytest.mark.parametrize("user", ["default", "router", "WORKER"])
def test_the_allowed_commands_are_those_of_the_documentation(server: Server, user: str) -> None:
    with server.client("admin") as admin:
        rules = admin.acl_getuser({"WORKER": "w1"}.get(user, user))
    allowed = {rule.removeprefix("+").replace("|", " ").upper() for rule in rules["commands"] if rule[0] == "+"}
    assert allowed == documented()[user]
    assert {rule for rule in [*rules["commands"], *rules["categories"]] if rule[0] == "-"} == {"-@all"}


def test_a_worker_cannot_touch_anothers_keys_nor_stop_the_server(server: Server) -> None:
    other = Life(server.url("w1"), "w1")
    assert other.beat() and other.store("mine")
    with server.client("w0") as client:
        with pytest.raises(NoPermissionError):
            take_epoch(client, CLUSTER, "w1")
        writer = RedisIndexWriter(client, CLUSTER, Ledger("w1", other.epoch), capacity=100)
        assert not writer.publish_snapshot() and not writer.publish([BlocksStored([KEY])])
        with pytest.raises(redis.ResponseError):
            LeaseKeeper(client, CLUSTER).release("w1", other.epoch)
        for command in (
            ["SET", redis_key(CLUSTER, "w1", "epoch"), "9"], ["DEL", redis_key(CLUSTER, "w1", "lease")],
            ["SET", f"{CLUSTER}:secret-check", "x"], ["SADD", f"{CLUSTER}:{{prefixes}}:ids", "x"], ["GET", "elsewhere"],
            ["KEYS", "*"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["ACL", "LIST"], ["SHUTDOWN"], 
            ["EVAL", "return 1", "0"],
            ["SREM", f"{CLUSTER}:workers", "w1"], ["SCRIPT", "FLUSH"], ["SUBSCRIBE", "c"], ["MONITOR"],
        ):  # fmt: skip
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)
    assert other.beat() and other.writer.snapshots == 1
    other.client.close()


def test_a_router_cannot_write_what_workers_hold(server: Server) -> None:
    life = Life(server.url("w0"), "w0")
    assert life.beat()
    commands = [["XADD", redis_key(CLUSTER, "w0", "events"), "*", "b", "x"], ["FLUSHALL"], ["KEYS", "*"]]
    commands.append(["INCR", redis_key(CLUSTER, "w0", "epoch")])
    if version() >= 7:  # before, a key that may be read may be written by a command that is allowed elsewhere
        commands += [["SET", redis_key(CLUSTER, "w0", "epoch"), "9"], ["DEL", redis_key(CLUSTER, "w0", "meta")]]
        commands.append(["HSET", redis_key(CLUSTER, "w0", "meta"), "seq", "9"])
    with server.client("router") as client:
        for command in commands:
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)
    life.client.close()


@pytest.mark.timeout(110)
def test_a_fleet_of_processes_asks_for_nothing_that_its_users_may_not(server: Server, tmp_path: Path) -> None:
    """Redis keeps a log of what it refused: after requests, a published prefix and a purge it is empty."""
    (tmp_path / "tenants.toml").write_text(
        f'[tenants.a]\nkeys = ["{key_hash("key of a")}"]\npublish = ["own", "public"]\nrequests_per_s = 100.0\n'
    )
    with ExitStack() as parts:
        fleet = Fleet(SimpleNamespace(url=""), tmp_path, parts, {"a": ""}, {})  # type: ignore[arg-type]
        known = ("--cluster", CLUSTER, "--model", "pando-tiny", "--redis")
        workers = [
            fleet.launch("worker", *known, server.url(name), "--worker-id", name, "--runner", "simulated",
                         "--cpu-blocks", "500", "--device-blocks", "60")
            for name in ("w0", "w1")
        ]  # fmt: skip
        assert all(line(worker) for worker in workers)
        ports = ("--port", "0", "--http-port", "0", "--admin-port", "0")
        flags = ("--tenants", str(tmp_path / "tenants.toml"), *ports, *known, server.url("router"))
        routers = [fleet.launch("router", *flags) for _ in range(2)]
        for router in routers:
            router.ready = line(router)
        clients = [parts.enter_context(fleet.client(router, "a")) for router in routers]
        for client in clients:
            until_true(lambda client=client: answers(client))
        head = some_tokens(1, 128)
        prefix = clients[0].publish_prefix(token_ids=head, scope="public", warm=True, copies=2)
        for seed in range(2, 22):
            assert clients[seed % 2].generate(token_ids=head + some_tokens(seed, 256), max_tokens=8)
        until_true(lambda: len(clients[1].list_prefixes()) == 1)
        clients[1].delete_prefix(prefix.id)
        with grpc.insecure_channel(routers[0].ready["admin"]) as channel:
            admin_pb2_grpc.AdminStub(channel).PurgeTenant(admin_pb2.PurgeTenantRequest(tenant="a"), timeout=20)
    with server.client("admin") as admin:
        refused = {(entry["username"], entry["object"]) for entry in admin.acl_log()}
        assert {command for _, command in refused} <= {"client", "client|setinfo"}, (
            "redis-py says its name, and may not"
        )
        assert admin.get(redis_key(CLUSTER, "w0", "epoch")) and admin.exists(f"{CLUSTER}:{{prefixes}}:version")


# TLS


def supports_tls(folder: Path) -> bool:
    """A server without TLS does not know its options and ends."""
    command = [redis_server_binary(), "--port", "0", "--tls-port", "0", "--unixsocket", str(folder / "s"), "--save", ""]
    try:
        subprocess.run(command, timeout=1.0, capture_output=True, check=False, cwd=folder)
    except subprocess.TimeoutExpired:
        return True
    return False


def certificate(folder: Path, name: str, issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None) -> Any:
    """Write `name`.crt and `name`.key; signed by itself, as a CA, without an issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer_name, signer_key = issuer or (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), critical=False)
    )
    signed = builder.sign(signer_key, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / f"{name}.key").write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    return subject, key


@pytest.mark.asyncio
async def test_tls_with_our_own_ca_and_client_certificates(tmp_path: Path, free_port: Callable[[], int]) -> None:
    if not supports_tls(tmp_path):
        pytest.skip(f"{redis_server_binary()} was built without TLS: put a redis-server that has it on PATH")
    ca = certificate(tmp_path, "ca", None)
    certificate(tmp_path, "tls", ca)
    certificate(tmp_path, "client", ca)
    port = free_port()
    (tmp_path / "empty.conf").write_text("save ''\n")
    environment = os.environ | {
        "REDIS_PASSWORD": "pw", "REDIS_CONF": str(tmp_path / "empty.conf"), "REDIS_PORT": str(port),
        "REDIS_AUTH_FILE": str(tmp_path / "auth.conf"), "REDIS_TLS_FOLDER": str(tmp_path), "REDIS_TLS_CLIENTS": "yes",
    }  # fmt: skip
    environment["PATH"] = f"{Path(redis_server_binary()).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["sh", str(ROOT / "deploy" / "redis" / "start.sh"), "--dir", str(tmp_path)],
        env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    files = {f"redis_{name}": str(tmp_path / file) for name, file in
             (("ca", "ca.crt"), ("cert", "client.crt"), ("key", "client.key"))}  # fmt: skip
    url = f"rediss://:pw@127.0.0.1:{port}/0"
    settings = RouterSettings(redis=url, **files)
    try:
        for _ in range(250):
            if not why_no_answer(settings.redis_url, 0.5):
                break
            time.sleep(0.02)
        life = Life(WorkerSettings(redis=url, **files).redis_url, "w0")
        assert life.beat() and life.store(1)
        index = MemoryIndex()
        mirror = Mirror(settings.redis_url, CLUSTER, index, times=FAST)
        await mirror.start()
        await until(lambda: index.num_blocks(WorkerId("w0")) == 1)
        await mirror.stop()
        life.client.close()
        assert why_no_answer(url)  # neither the CA nor a certificate
        assert why_no_answer(RouterSettings(redis=url, redis_ca=files["redis_ca"]).redis_url)
        assert why_no_answer(f"redis://:pw@127.0.0.1:{port}/0")
    finally:
        process.terminate()
        process.wait(10)
