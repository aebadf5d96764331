"""The command: `python -m bench.sharing [--scenario NAME|all] [--json] [--runner simulated|model]`.

Exit code 1 if a claim is missed. Progress goes to the standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from bench.sharing import burst, flight, forks, memory, multi_turn, offload, tenants
from bench.sharing.finding import Finding
from bench.sharing.local_worker import WorkerShape

Say = Callable[[str], None]
Scenario = Callable[[WorkerShape, Say], Finding]

SCENARIOS: dict[str, Scenario] = {
    "tenants": lambda worker, say: tenants.run_all(tenants.SHAPES, worker, say),
    "flight": lambda worker, say: flight.run(flight.FlightShape(), worker, say),
    "forks": lambda worker, say: forks.run(forks.ForksShape(), worker, say),
    "burst": lambda worker, say: burst.run(burst.BurstShape(), worker, say),
    "offload": lambda worker, say: offload.run(offload.OffloadShape(), worker, say),
    "multi_turn": lambda worker, say: multi_turn.run(multi_turn.MultiTurnShape(), worker, say),
    "memory": lambda worker, say: memory.run(memory.MemoryShape(), say),
}
NEEDS_MODEL = frozenset({"offload"})
"""Without --runner, with the model: what they claim is time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and show it."""
    parser = argparse.ArgumentParser(prog="bench.sharing", description=__doc__)
    parser.add_argument("--scenario", choices=("all", *SCENARIOS), default="all")
    parser.add_argument("--runner", choices=("simulated", "model"), help="default: the model for offload alone")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    found = []
    for name in SCENARIOS if arguments.scenario == "all" else (arguments.scenario,):
        runner = arguments.runner or ("model" if name in NEEDS_MODEL else "simulated")
        worker = WorkerShape(num_blocks=1, simulated=runner == "simulated", threads=arguments.threads)
        began = time.monotonic()
        finding = SCENARIOS[name](worker, _sayer(name))
        _sayer(name)(f"{time.monotonic() - began:.1f} s")
        found.append(replace(finding, setting=f"{finding.setting}; {runner} runner") if name != "memory" else finding)
    if arguments.json:
        print(json.dumps([finding.document() for finding in found]))
    else:
        show(found)
    return 0 if all(finding.met for finding in found) else 1


def _sayer(name: str) -> Say:
    return lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)


def show(found: Sequence[Finding]) -> None:
    """Print rows and claims as tables."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for finding in found:
        console.print(f"\n[bold]{finding.scenario}[/bold]  {finding.setting}")
        seen = Table(*finding.rows[0])
        for row in finding.rows:
            seen.add_row(*(str(value) for value in row.values()))
        console.print(seen)
        claims = Table("claim", "measured", "bound", "")
        for claim in finding.claims:
            claims.add_row(
                claim.says, f"{claim.measured:g}", f"{claim.relation} {claim.bound:g}", "met" if claim.met else "MISSED"
            )
        console.print(claims)


if __name__ == "__main__":
    sys.exit(main())
