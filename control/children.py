"""Child processes that cannot outlive this one: started with a death signal, ended in order, orphans swept up.

Knows nothing of what the children do. Invariant: after `end_descendants` returns no process started below is alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

SOURCE_ROOT = Path(__file__).resolve().parent.parent

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# Runs between fork and exec of the child, in an interpreter of its own: a preexec_fn would run Python after a fork of
# a process that has threads. The kernel keeps the death signal over exec; a parent that died before is seen by its pid.
_LAUNCH = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


# Outlives the process that started it, by design. Only who has a file open for writing is of ours: an operator may read
# a log there. What is killed may have started others, or written a file, meanwhile: hence the rounds.
_SWEEP = """
import glob, os, shutil, signal, sys, time
folder, spared = sys.argv[1], {os.getpid(), int(sys.argv[2])}

class Asked(Exception):
    pass

def asked(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Asked

signal.signal(signal.SIGTERM, asked)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    sys.stdin.buffer.read()
except Asked:
    pass

def writes(path):
    try:
        if not os.readlink(path).startswith(folder + "/"):
            return False
        with open(path.replace("/fd/", "/fdinfo/")) as lines:
            flags = [int(line.split()[1], 8) for line in lines if line.startswith("flags:")]
        return flags[0] & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return False

gone = 0
for _ in range(200):
    found = {int(path.split("/")[2]) for path in glob.glob("/proc/[0-9]*/fd/*") if writes(path)}
    for pid in found - spared:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    if not found - spared:
        shutil.rmtree(folder, ignore_errors=True)
        gone = 0 if os.path.exists(folder) else gone + 1
        if gone == 2:
            break
    time.sleep(0.05)
"""


class Child:
    """A running child in a session of its own, so that a terminal's Ctrl-C reaches the parent alone.

    It is killed when the thread that started it ends, so start it from the main thread.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: int | IO[bytes] | None = None
    ) -> None:
        """`command[0]` is the path of an executable; stdin is empty, stderr is the parent's."""
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def stdout(self) -> IO[bytes]:
        """The read end of its output, where it was started with PIPE."""
        assert self._process.stdout is not None
        return self._process.stdout

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stop(self, grace_s: float = 5.0) -> None:
        """Ask it to end, kill it when it has not after `grace_s` seconds; may be called again."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Sweeper:
    """A new temporary folder, and a small process that, when this one ends in whatever way or when it is asked to by
    SIGTERM, kills all others that write in the folder and removes it.

    For programs that start others in ways of their own, as Ray does, and keep their logs in that folder. Whoever only
    reads there is left alone.
    """

    def __init__(self, prefix: str, parent: str | None = None) -> None:
        """The folder's name begins with `prefix`; it lies in `parent`, or where temporary files do."""
        with signals_held():  # no signal finds a folder without its sweeper, nor a sweeper that would die of it
            self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            command = [sys.executable, "-I", "-S", "-c", _SWEEP, str(self.folder), str(os.getpid())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def sweep(self) -> None:
        """Do it now and wait until it is done; may be called again."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Within, what asks this process to end waits, as long as it has one thread. Children begun within inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def source_path(env: Mapping[str, str] = os.environ) -> str:
    """PYTHONPATH with which a Python child finds our packages, wherever it runs."""
    kept = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join(dict.fromkeys([str(SOURCE_ROOT), *kept]))


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that `end_descendants` finds them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(grace_s: float = 2.0) -> None:
    """End every process below this one: SIGTERM, then SIGKILL after `grace_s` seconds."""
    deadline = time.monotonic() + grace_s
    for pid in descendants():
        _signal(pid, signal.SIGTERM)
    while left := descendants():
        if time.monotonic() > deadline:
            for pid in left:
                _signal(pid, signal.SIGKILL)
        time.sleep(0.02)


def descendants() -> list[int]:
    """Ids of the living processes below this one, children before grandchildren; none where there is no /proc."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # ended while we looked
        if state != "Z":
            below.setdefault(int(parent), []).append(int(entry.parent.name))
    found = list(below.get(os.getpid(), ()))
    for pid in found:
        found.extend(below.get(pid, ()))
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
