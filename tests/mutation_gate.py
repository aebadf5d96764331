"""Plants known bugs in a copy of the block store, one at a time, and demands that its tests catch each.

Run as `python -m tests.mutation_gate [NAME ...]`; exit code 1 if the tests fail without a bug, or pass with one.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/unit/kvstore"
# A bug may loop for ever. Processor time, as the gate has to say the same on a busy machine.
CPU_LIMIT_S = 240
TIME_LIMIT_S = 3600
PYTEST_INI = "[pytest]\naddopts = --import-mode=importlib -q -x -p no:cacheprovider\nmarkers = slow: long\n"
# A failure is enough: no time for the smallest example, and the same examples each time.
CONFTEST = """
from hypothesis import Phase, settings

settings.register_profile("gate", phases=(Phase.explicit, Phase.generate), derandomize=True, database=None)
settings.load_profile("gate")
"""


@dataclass(frozen=True, slots=True)
class Bug:
    """A text in a file of `kvstore` and what a mistaken hand would have written there."""

    name: str
    file: str
    right: str
    wrong: str
    also: list[str] | None = None
    """A second place in the same file, right and wrong."""


def planned() -> list[Bug]:
    """The bugs of `planted_bugs.toml`."""
    with (ROOT / "tests" / "planted_bugs.toml").open("rb") as file:
        return [Bug(name, **entry) for name, entry in tomllib.load(file).items()]


def main() -> int:
    """Run the gate; the exit code."""
    parser = argparse.ArgumentParser(prog="tests.mutation_gate", description=__doc__)
    parser.add_argument("names", nargs="*", help="bugs to plant; all if none is named")
    names = set(parser.parse_args().names)
    bugs = [bug for bug in planned() if not names or bug.name in names]
    with tempfile.TemporaryDirectory(prog := "mutation") as folder:
        copy = Path(folder) / prog
        prepare(copy)
        if not passes(copy):
            print("the tests fail without a bug")
            return 1
        missed = [bug.name for bug in bugs if not is_caught(copy, bug)]
    print(f"{len(bugs) - len(missed)} of {len(bugs)} bugs caught" + "".join(f"\nmissed: {name}" for name in missed))
    return 1 if missed else 0


def prepare(copy: Path) -> None:
    """A copy of what the tests of the block store need, and no more."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kvstore", copy / "kvstore", ignore=ignored)
    shutil.copytree(ROOT / TESTS, copy / TESTS, ignore=ignored)
    (copy / "pytest.ini").write_text(PYTEST_INI)
    (copy / "conftest.py").write_text(CONFTEST)


def is_caught(copy: Path, bug: Bug) -> bool:
    """Plant a bug, run the tests, take it out again; whether they failed."""
    path = copy / "kvstore" / bug.file
    text = planted = path.read_text()
    for right, wrong in filter(None, ((bug.right, bug.wrong), bug.also)):
        if planted.count(right) != 1:
            raise SystemExit(f"{bug.name}: its place in {bug.file} is there {planted.count(right)} times, not once")
        planted = planted.replace(right, wrong)
    path.write_text(planted)
    began = time.monotonic()
    caught = not passes(copy)
    path.write_text(text)
    print(f"{'caught' if caught else 'MISSED'}  {time.monotonic() - began:5.1f} s  {bug.name}", flush=True)
    return caught


def passes(copy: Path) -> bool:
    """Whether the tests pass in the copy, and in time."""
    # Bytecode of equal size and second would hide the next bug.
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", TESTS]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=TIME_LIMIT_S, check=False,
            preexec_fn=_bound_processor_time,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, -signal.SIGXCPU):
        sys.stdout.write(done.stdout.decode(errors="replace")[-2000:])
        raise SystemExit("the tests could not be run")
    return done.returncode == 0


def _bound_processor_time() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S + 5))


if __name__ == "__main__":
    sys.exit(main())
