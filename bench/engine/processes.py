"""The processes of one measured system: the CPU time they took, and a pause while another system is measured.

Knows process ids and /proc, no system. Invariant: what was paused goes on when the block ends.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class ProcessTree:
    """`roots` and all that they start, now or later."""

    def __init__(self, roots: Collection[int]) -> None:
        self._roots = tuple(roots)

    def pids(self) -> list[int]:
        """Those that live, parents first."""
        below: dict[int, list[int]] = {}
        alive = set()
        for pid, fields in _stats():
            alive.add(pid)
            below.setdefault(int(fields[1]), []).append(pid)
        found = [pid for pid in self._roots if pid in alive]
        for pid in found:
            found.extend(child for child in below.get(pid, ()) if child not in found)
        return found

    def cpu_s(self) -> float:
        """Seconds of CPU that the living ones, and their children that ended, have taken so far."""
        wanted = set(self.pids())
        return TICK_S * sum(sum(map(int, fields[11:15])) for pid, fields in _stats() if pid in wanted)

    def signal(self, number: int) -> None:
        """Send a signal to all."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def paused(trees: Sequence[ProcessTree]) -> Iterator[None]:
    """Within, these get no CPU; nothing must be on its way to them."""
    try:
        for tree in trees:
            tree.signal(signal.SIGSTOP)
        yield
    finally:
        for tree in trees:
            tree.signal(signal.SIGCONT)


def _stats() -> Iterator[tuple[int, list[str]]]:
    """Id of every process and what its stat says behind its name: state, parent, ..."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended while we looked
            yield int(entry.parent.name), entry.read_text().rpartition(")")[2].split()
