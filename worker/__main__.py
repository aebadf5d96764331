"""`python -m worker`: one worker from the command line, until SIGTERM or SIGINT.

Exit codes: 0 after a signal, 1 when it stopped by itself, 2 when it could not start.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Sequence

from pando.command_line import fail, parse_switches
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker.process import WorkerProcess

PROG = "python -m worker"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; the exit code."""
    settings, switches = parse_switches(
        WorkerSettings,
        argv,
        {"json": "print one line of JSON when ready"},
        prog=PROG,
        description="One Pando worker: a replica of the model behind the worker link.",
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Until it serves there is nothing to end well.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = WorkerProcess(settings)
    try:
        ready = process.start()
    except ConfigError as error:
        fail(PROG, error.message)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: process.request_stop())
    if "json" in switches:
        print(json.dumps(dataclasses.asdict(ready)), flush=True)
    else:
        print(f"worker {ready.worker_id}, epoch {ready.epoch}, listens on {ready.address}", flush=True)
    process.wait()
    if process.failure:
        print(f"{PROG}: {process.failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
