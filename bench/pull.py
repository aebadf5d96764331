"""Blocks from one worker for another: what they cost, whether the choice to fetch them is right, and a shortcut.

Run as `python -m bench.pull [--part transfer|choice|all] [--rounds N] [--json]`. Exit code 1 if a claim is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from bench import pull_choice, pull_transfer
from bench.sharing.__main__ import show
from bench.sharing.finding import Finding


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and show it."""
    parser = argparse.ArgumentParser(prog="bench.pull", description=__doc__)
    parser.add_argument("--part", choices=("all", "transfer", "choice"), default="all")
    parser.add_argument("--rounds", type=int, default=7, help="pulls of each length")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    found: list[Finding] = []
    if given.part != "choice":
        found += pull_transfer.run(pull_transfer.KINDS, given.rounds)
    if given.part != "transfer":
        found.append(pull_choice.run())
    if given.json:
        print(json.dumps([finding.document() for finding in found]))
    else:
        show(found)
    return 0 if all(finding.met for finding in found) else 1


if __name__ == "__main__":
    sys.exit(main())
