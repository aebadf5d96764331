"""Plants known bugs in a copy of the block store, one at a time, and demands that its tests catch each.

Run as `python -m tests.mutation_gate [NAME ...]`; exit code 1 if the tests fail without a bug, or pass with one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/unit/kvstore"
TIME_LIMIT_S = 240
PYTEST_INI = (
    "[pytest]\naddopts = --import-mode=importlib -q -x -p no:cacheprovider\nmarkers = slow: long\ntimeout = 60\n"
)
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
    also: tuple[str, str] | None = None
    """A second place in the same file, right and wrong."""


BUGS = (
    # Keys, scopes, what counts as a hit.
    Bug("scope_switch_lost", "block_key.py", "self._parent = _enter(key, self.root, self._spans[self._position].seed)", "self._parent = key"),
    Bug("hit_ignores_tokens", "contents.py", "if self.tokens[block] == tokens and self.roots", "if self.roots"),
    Bug("hit_ignores_scope", "contents.py", "and self.roots[block] == root and", "and"),
    Bug("hit_ignores_parent", "contents.py", " and self.parents[block] == parent:", ":"),
    Bug("no_token_left_to_compute", "block_table.py", "range(0, limit // pool.block_size * step, step)", "range(0, -(-limit // pool.block_size) * step, step)"),
    Bug("part_beyond_the_published_end", "block_table.py", "limit if region.end is None else region.end)", "limit)"),
    Bug("part_from_any_scope", "contents.py", "self.children.closest(parent, root + tokens)", "self.children.closest(parent, bytes(16) + tokens)", ("return root + self.tokens[block]", "return bytes(16) + self.tokens[block]")),
    Bug("part_misses_the_best_child", "children.py", "near.append(self._runs[at][inside - 1])", "pass"),
    # References and writes.
    Bug("double_free_accepted", "block_pool.py", "if not 0 <= block < self.num_blocks or references[block] == 0:\n                for", "if not 0 <= block < self.num_blocks:\n                for"),
    Bug("generation_kept_on_loss", "block_pool.py", "        self._generations[block] += 1\n", ""),
    Bug("generation_kept_on_allocation", "block_pool.py", "            generations[block] += 1\n", ""),
    Bug("write_to_shared_block", "block_pool.py", "return self._references[block] == 1 and", "return self._references[block] >= 1 and"),
    Bug("copy_sources_never_released", "block_table.py", "            self._pool.release(done)\n", ""),
    Bug("copy_source_not_held", "block_table.py", "        self._sources.append(source)\n", "        self._pool.release((source,))\n"),
    Bug("fork_forgets_stand_ins", "block_table.py", "        self._pool.acquire([block for _, block in self._stand_ins])\n", ""),
    Bug("stand_in_not_held", "block_table.py", "            self._stand_ins.append((index, resident))\n", "            pool.release((resident,))\n"),
    Bug("window_gives_up_parents_first", "block_table.py", "        if end < self._chain.index:\n            return 0\n", ""),
    Bug("window_forgets_its_sinks", "block_table.py", "first = max(-(-sinks // size), self._hole_end)", "first = self._hole_end"),
    # Single flight.
    Bug("followers_never_woken", "flights.py", "        flight.ended = True\n", ""),
    Bug("wait_on_a_colliding_key", "flights.py", "if flight is None or flight.root != root or flight.parent != parent:", "if flight is None:"),
    Bug("nobody_waits", "block_table.py", "        self.pending = Wait(flight, target)\n", ""),
    Bug("flight_not_ended_on_release", "block_table.py", "            self._pool.flights.end(self._flight, self._chain.index)\n        if self.block_ids", "            pass\n        if self.block_ids"),
    # Eviction and quotas.
    Bug("parents_before_children", "eviction.py", "self._contents.numbers[block] in self._contents.children\n            or ", ""),
    Bug("evicts_what_is_in_transfer", "eviction.py", "\n            or block in self._in_transfer", ""),
    Bug("one_hit_protects", "eviction.py", "PROTECTING_HITS = 2", "PROTECTING_HITS = 1"),
    Bug("floors_not_sheltered", "eviction.py", "return owner.charge <= owner.floor", "return False"),
    Bug("over_its_floor_not_first", "eviction.py", "            self._exposed[owner] = None\n", "            pass\n"),
    Bug("floors_not_kept_free", "quota.py", "return self.num_held + sum(wanted.values()) + unmet <= self._num_blocks", "return True"),
    Bug("lone_holder_stuck", "block_table.py", "return self._pool.num_holders == bool(self.block_ids)", "return False"),
    Bug("ceiling_not_held", "block_pool.py", "            while owner.excess:", "            while owner.excess < 0:"),
    Bug("charged_to_the_first_toucher", "block_pool.py", "        self._charge_to(block, self._ledger.owner(content.root))\n", ""),
    Bug("pins_over_budget", "pins.py", "limit = min(len(token_ids), room * self._pool.block_size)", "limit = len(token_ids)"),
    Bug("purge_leaves_what_hangs_below", "block_pool.py", "for block in reversed(self.contents.below(list(blocks))):", "for block in blocks:"),
    Bug("removal_not_told", "block_pool.py", "        self._changes.removed(key)\n", ""),
    # The CPU tier.
    Bug("late_demotion_believed", "tiers.py", "valid = self.device.generation(order.source) == demotion.generation", "valid = True"),
    Bug("late_promotion_believed", "tiers.py", "valid = self.cpu.generation(order.source) == promotion.generation", "valid = True"),
    Bug("checksum_ignored", "tiers.py", "load.ok[promotion.index] = ok and valid", "load.ok[promotion.index] = valid"),
    Bug("corrupt_block_kept", "tiers.py", "            self.cpu.drop((order.source,))\n", "            pass\n"),
    Bug("holes_in_a_load", "tiers.py", "good = load.ok.index(False) if False in load.ok else len(load.ok)", "good = len(load.ok)"),
    Bug("load_into_a_freed_block", "tiers.py", "        if load.table.life == load.life:\n            self._finish(load)\n", "        self._finish(load)\n"),
    Bug("orphans_left_in_cpu", "tiers.py", "            self._drop_below(number)\n", "            pass\n"),
    Bug("two_copies_of_one_block", "tiers.py", "if number in self._demoting or self.cpu", "if self.cpu"),
    Bug("freed_copies_not_wiped", "block_pool.py", "            self._wipes.append(BlockId(block))\n", "            pass\n"),
    Bug("always_load", "transfers.py", "return not computing or self", "return True or self"),
)  # fmt: skip


def main() -> int:
    """Run the gate; the exit code."""
    parser = argparse.ArgumentParser(prog="tests.mutation_gate", description=__doc__)
    parser.add_argument("names", nargs="*", help="bugs to plant; all if none is named")
    names = set(parser.parse_args().names)
    bugs = [bug for bug in BUGS if not names or bug.name in names]
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
            command, cwd=copy, env=environment, capture_output=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        sys.stdout.write(done.stdout.decode(errors="replace")[-2000:])
        raise SystemExit("the tests could not be run")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
