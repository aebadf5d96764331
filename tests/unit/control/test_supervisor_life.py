"""The supervisor without Ray: lives are scripted, time is short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from control.supervisor import Life, LifeEnded, Patience, Ready, Refusal, Supervisor, WorkerStatus

pytestmark = pytest.mark.asyncio

QUICK = Patience(ping_every_s=0.01, ping_timeout_s=0.05, steady_s=0.05, backoff_s=0.01, backoff_max_s=0.05, stop_s=0.1)


class Scripted:
    """Workers of which each life starts, serves and ends as the test says; epochs count lives."""

    def __init__(self, *, refuses: str = "", never_starts: bool = False) -> None:
        self.refuses = refuses
        self.never_starts = never_starts
        self.lives = 0
        self.alive = 0
        self.most_alive = 0
        self.hung = False
        self.dead = asyncio.Event()
        self.stopped: list[str] = []

    def launch(self, worker_id: str) -> Life:
        self.lives += 1
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        epoch, dead, ended = self.lives, asyncio.Event(), False
        self.dead = dead

        async def ready() -> Ready | Refusal:
            await asyncio.sleep(0)
            if self.never_starts:
                raise LifeEnded("exit code 1")
            return Refusal(self.refuses) if self.refuses else Ready(worker_id, epoch, 100 + epoch, f"host:{epoch}")

        async def over() -> str:
            await dead.wait()
            raise LifeEnded("killed")

        async def ping() -> None:
            if self.hung:
                await asyncio.sleep(3600)

        async def stop() -> None:
            self.stopped.append(worker_id)

        def end() -> None:
            nonlocal ended
            self.alive -= not ended
            ended = True

        return Life(ready=ready, over=over, ping=ping, stop=stop, end=end)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.002)


def only(supervisor: Supervisor) -> WorkerStatus:
    (status,) = supervisor.workers()
    return status


async def test_a_dead_worker_comes_back_under_its_name_with_a_new_epoch() -> None:
    script = Scripted()
    supervisor = Supervisor(["w"], script.launch, patience=QUICK)
    supervisor.start()
    await until(lambda: only(supervisor).state == "ready")
    assert (only(supervisor).epoch, only(supervisor).pid, only(supervisor).address) == (1, 101, "host:1")
    script.dead.set()
    await until(lambda: only(supervisor).epoch == 2)
    assert (only(supervisor).worker_id, only(supervisor).restarts) == ("w", 1)
    assert script.most_alive == 1
    await supervisor.stop()


async def test_a_worker_that_hangs_is_ended_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    script = Scripted()
    supervisor = Supervisor(["w"], script.launch, patience=QUICK)
    supervisor.start()
    await until(lambda: only(supervisor).state == "ready")
    script.hung = True
    await until(lambda: only(supervisor).restarts >= 1)
    script.hung = False
    await until(lambda: only(supervisor).epoch >= 2 and only(supervisor).state == "ready")
    assert script.most_alive == 1 and "no answer" in caplog.text
    await supervisor.stop()


async def test_settings_that_cannot_work_are_reported_not_tried_again() -> None:
    script = Scripted(refuses="the model folder has no config.json")
    supervisor = Supervisor(["w"], script.launch, patience=QUICK)
    supervisor.start()
    await until(lambda: only(supervisor).state == "refused")
    assert only(supervisor).reason == "the model folder has no config.json"
    assert script.lives == 1 and script.alive == 0
    await supervisor.stop()


async def test_a_worker_that_never_served_is_given_up_after_some_tries() -> None:
    script = Scripted(never_starts=True)
    supervisor = Supervisor(["w"], script.launch, patience=QUICK)
    supervisor.start()
    await until(lambda: only(supervisor).state == "refused")
    assert script.lives == QUICK.first_starts and "exit code 1" in only(supervisor).reason
    await supervisor.stop()


async def test_a_worker_that_served_once_is_never_given_up() -> None:
    script = Scripted()
    supervisor = Supervisor(["w"], script.launch, patience=QUICK)
    supervisor.start()
    await until(lambda: only(supervisor).state == "ready")
    script.refuses = "Redis does not answer"
    script.dead.set()
    await until(lambda: script.lives > QUICK.first_starts + 2)
    assert only(supervisor).state in ("waiting", "starting")
    script.refuses = ""
    await until(lambda: only(supervisor).state == "ready")
    await supervisor.stop()


async def test_a_crash_loop_is_slowed_down() -> None:
    script = Scripted()
    patience = Patience(steady_s=60.0, backoff_s=0.02, backoff_max_s=0.3)
    supervisor = Supervisor(["w"], script.launch, patience=patience)
    began = asyncio.get_running_loop().time()
    supervisor.start()
    for life in range(1, 6):
        await until(lambda life=life: only(supervisor).epoch == life and only(supervisor).state == "ready")
        script.dead.set()
    await until(lambda: only(supervisor).epoch == 6)
    assert asyncio.get_running_loop().time() - began >= 0.02 + 0.04 + 0.08 + 0.16 + 0.3
    await supervisor.stop()


async def test_stop_asks_first_and_leaves_nothing_alive() -> None:
    script = Scripted()
    supervisor = Supervisor(["a", "b"], script.launch, patience=QUICK)
    supervisor.start()
    await until(lambda: all(w.state == "ready" for w in supervisor.workers()))
    await supervisor.stop()
    assert sorted(script.stopped) == ["a", "b"]
    assert script.alive == 0 and script.lives == 2
    assert {w.state for w in supervisor.workers()} == {"stopped"}
