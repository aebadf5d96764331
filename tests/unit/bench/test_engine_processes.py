"""Processes of a measured system: found with what they start, their CPU time, and a pause that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.engine.processes import ProcessTree, paused

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "sum(range(3_000_000)); print('done', flush=True); input()"])
child.wait()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    """Whose child has worked and waits."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"done\n"
        yield process
        process.communicate(b"\n")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_children_belong_to_it_and_their_time_too(parent: subprocess.Popen[bytes]) -> None:
    tree = ProcessTree([parent.pid])
    [first, child] = tree.pids()
    assert first == parent.pid and child != first
    assert ProcessTree([child]).cpu_s() > 0
    assert tree.cpu_s() >= ProcessTree([child]).cpu_s()


def test_what_is_paused_goes_on_after_the_block_even_if_it_fails(parent: subprocess.Popen[bytes]) -> None:
    tree = ProcessTree([parent.pid])
    with pytest.raises(RuntimeError), paused([tree]):
        assert [state(pid) for pid in tree.pids()] == ["T", "T"]
        raise RuntimeError
    assert "T" not in [state(pid) for pid in tree.pids()]


def test_a_tree_that_is_gone_has_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    tree = ProcessTree([process.pid])
    tree.signal(signal.SIGCONT)
    assert tree.pids() == [] and tree.cpu_s() == 0
