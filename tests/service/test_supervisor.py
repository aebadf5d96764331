"""Worker actors under their supervisor in a real Ray: names, leases, SIGKILL, hang, refusal, an end without a trace."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import redis.asyncio

from control.cluster import Cluster, Crew
from control.supervisor import Patience, WorkerStatus
from kvstore.lease import Lease, view_leases
from pando.errors import ConfigError
from pando.settings import WorkerSettings

pytestmark = pytest.mark.ray

PATIENCE = Patience(ping_every_s=0.5, steady_s=0.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(namespace="pando", slots=3)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def crew(cluster: Cluster, redis_url: str, request: pytest.FixtureRequest) -> Iterator[Crew]:
    settings = WorkerSettings(redis=redis_url, cluster=request.node.name[:40], runner="simulated", device_blocks=64)
    crew = Crew(cluster, settings, 2, patience=PATIENCE)
    crew.start()
    yield crew
    crew.stop()


def hears_nothing(workers: object) -> None:
    """A listener for `wait_ready`."""


def leases(url: str, cluster: str) -> dict[str, Lease]:
    async def read() -> dict[str, Lease]:
        async with redis.asyncio.Redis.from_url(url) as client:
            return {**(await view_leases(client, cluster)).leases}

    return asyncio.run(read())


def until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except OSError:
        return False


def by_id(crew: Crew) -> dict[str, WorkerStatus]:
    return {worker.worker_id: worker for worker in crew.workers()}


def test_a_killed_worker_comes_back_with_a_new_epoch_and_its_lease(
    crew: Crew, redis_url: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.name[:40]
    before = {worker.worker_id: worker for worker in crew.wait_ready(60, hears_nothing)}
    assert sorted(before) == ["worker-0", "worker-1"]
    assert all(answers(worker.address) for worker in before.values())
    assert {w: (lease.epoch, lease.pid) for w, lease in leases(redis_url, name).items()} == {
        w: (status.epoch, status.pid) for w, status in before.items()
    }
    os.kill(before["worker-0"].pid, signal.SIGKILL)
    until(lambda: by_id(crew)["worker-0"].epoch == before["worker-0"].epoch + 1)
    after = by_id(crew)
    assert after["worker-0"].state == "ready" and after["worker-0"].restarts == 1
    assert after["worker-0"].pid != before["worker-0"].pid and answers(after["worker-0"].address)
    assert after["worker-1"] == before["worker-1"]
    assert leases(redis_url, name)["worker-0"].epoch == after["worker-0"].epoch
    assert not answers(before["worker-0"].address)


def test_a_hung_worker_is_replaced(cluster: Cluster, redis_url: str) -> None:
    settings = WorkerSettings(redis=redis_url, cluster="hung", runner="simulated", device_blocks=64)
    crew = Crew(cluster, settings, 1, patience=Patience(ping_every_s=0.2, ping_timeout_s=1.0, steady_s=0.0))
    crew.start()
    try:
        (before,) = crew.wait_ready(60, hears_nothing)
        os.kill(before.pid, signal.SIGSTOP)
        until(lambda: by_id(crew)["worker-0"].epoch == before.epoch + 1)
        until(lambda: not Path(f"/proc/{before.pid}").exists())
    finally:
        crew.stop()


def test_a_stopped_crew_leaves_no_process_no_lease_and_no_name(
    crew: Crew, redis_url: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.name[:40]
    ready = crew.wait_ready(60, hears_nothing)
    assert ray.get_actor("worker-0", namespace=name)
    crew.stop()
    until(lambda: not any(Path(f"/proc/{worker.pid}").exists() for worker in ready))
    assert leases(redis_url, name) == {}
    with pytest.raises(ValueError):
        ray.get_actor("worker-0", namespace=name)


def test_a_worker_that_cannot_start_is_one_line(cluster: Cluster, redis_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["SomethingElse"]}', "utf-8")
    settings = WorkerSettings(redis=redis_url, cluster="refused", model=str(folder), max_model_len=1)
    crew = Crew(cluster, settings, 1, patience=PATIENCE)
    crew.start()
    try:
        with pytest.raises(ConfigError, match="worker-0 cannot start: ") as refused:
            crew.wait_ready(60, hears_nothing)
        assert "\n" not in refused.value.message and "internal error" not in refused.value.message
    finally:
        crew.stop()


def test_a_second_fleet_of_the_same_name_is_refused(
    cluster: Cluster, crew: Crew, request: pytest.FixtureRequest
) -> None:
    settings = WorkerSettings(cluster=request.node.name[:40], runner="simulated")
    with pytest.raises(ConfigError, match="--cluster"):
        Crew(cluster, settings, 1).start()


def test_a_lost_supervisor_is_started_again_with_its_workers(crew: Crew, request: pytest.FixtureRequest) -> None:
    before = crew.wait_ready(60, hears_nothing)
    assert crew.tend() is False
    ray.kill(ray.get_actor("supervisor", namespace=request.node.name[:40]))
    until(lambda: not any(Path(f"/proc/{worker.pid}").exists() for worker in before))
    assert crew.tend() is True
    after = crew.wait_ready(60, hears_nothing)
    assert [worker.epoch for worker in after] == [worker.epoch + 1 for worker in before]


def test_the_supervisor_never_loads_torch(crew: Crew, request: pytest.FixtureRequest) -> None:
    crew.wait_ready(60, hears_nothing)
    supervisor = ray.get_actor("supervisor", namespace=request.node.name[:40])
    pid = ray.get(supervisor.pid.remote())
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
