"""Child processes end with their parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from control.children import SOURCE_ROOT, Child, Sweeper, signals_held, source_path

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]

PARENT = """
import subprocess, sys, time
from control.children import Child, adopt_orphans, end_descendants
adopt_orphans()
command = [sys.executable, "-c", "import time; time.sleep(600)"]
if sys.argv[1] == "grandchild":
    script = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); "
    command = [sys.executable, "-c", script + sys.argv[2], *command]
child = Child(command, stdout=subprocess.PIPE if sys.argv[1] == "grandchild" else None)
print(child.pid, int(child.stdout.readline()) if sys.argv[1] == "grandchild" else 0, flush=True)
if sys.argv[1] == "grandchild":
    end_descendants(grace_s=0.3)
    print("ended", flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def parent(*arguments: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": source_path()}
    return subprocess.Popen([sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE, text=True, env=env)


def test_stop_ends_a_child_that_listens() -> None:
    child = Child(SLEEP)
    assert child.exit_code() is None and alive(child.pid)
    child.stop()
    assert not alive(child.pid)
    child.stop()


def test_stop_kills_a_child_that_does_not_listen() -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    child = Child([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"1\n"
    child.stop(grace_s=0.2)
    assert not alive(child.pid)


def test_a_child_that_ended_gives_its_exit_code() -> None:
    child = Child([sys.executable, "-c", "raise SystemExit(3)"])
    assert until(lambda: child.exit_code() is not None)
    assert child.exit_code() == 3
    child.stop()


def test_a_child_has_a_session_of_its_own() -> None:
    child = Child(SLEEP)
    assert os.getsid(child.pid) == child.pid
    child.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_a_killed_parent_takes_its_child_with_it() -> None:
    with parent("child") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[0])
        assert alive(pid)
        process.send_signal(signal.SIGKILL)
        assert until(lambda: not alive(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
@pytest.mark.parametrize("child_then", ["time.sleep(600)", "sys.exit()"])
def test_every_descendant_is_ended_orphans_too(child_then: str) -> None:
    with parent("grandchild", child_then) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert process.stdout.readline() == "ended\n"
        assert not any(alive(pid) for pid in pids)
        process.kill()


def test_source_path_puts_our_packages_first_and_keeps_the_rest() -> None:
    assert source_path({}) == str(SOURCE_ROOT)
    assert source_path({"PYTHONPATH": f"/a:{SOURCE_ROOT}::/b"}).split(":") == [str(SOURCE_ROOT), "/a", "/b"]


@pytest.mark.skipif(sys.platform != "linux", reason="who has which file open is Linux's to say")
def test_the_sweeper_ends_who_writes_and_spares_who_reads(tmp_path: Path) -> None:
    sweeper = Sweeper("logs-", str(tmp_path))
    folder = sweeper.folder
    (folder / "log").write_text("a line\n", "utf-8")
    script = "import sys, time; file = open(sys.argv[1], sys.argv[2]); print(1, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(folder / "log")]
    reader, writer = (subprocess.Popen([*command, mode], stdout=subprocess.PIPE) for mode in ("r", "a"))
    with reader, writer:
        try:
            assert [process.stdout.readline() for process in (reader, writer) if process.stdout] == [b"1\n"] * 2
            sweeper.sweep()
            assert writer.wait(5) == -signal.SIGKILL
            assert reader.poll() is None
            assert not folder.exists()
        finally:
            reader.kill()
            writer.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="who has which file open is Linux's to say")
def test_a_sweeper_that_is_told_to_end_sweeps_first_however_early(tmp_path: Path) -> None:
    sweeper = Sweeper("logs-", str(tmp_path))
    os.kill(sweeper.pid, signal.SIGTERM)
    sweeper.sweep()
    assert not sweeper.folder.exists()


def test_signals_that_are_held_come_when_they_are_let_go() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
