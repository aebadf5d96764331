"""`python -m router`: one router from its command line, until SIGINT or SIGTERM.

A problem at the start is one line on stderr and exit code 2.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from pando.command_line import fail, parse_switches
from pando.errors import ConfigError
from pando.settings import RouterSettings
from router.process import Listening, RouterProcess

PROG = "pando router"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a router; gives the exit code."""
    settings, switches = parse_switches(
        RouterSettings,
        argv,
        {"json": "print one line of JSON when it listens"},
        prog=PROG,
        description="Run one router of a Pando fleet.",
    )
    if settings.processes != 1:
        fail(PROG, "this is one process: `pando router --processes N` starts several")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve(settings, as_json="json" in switches))
    except ConfigError as error:
        fail(PROG, error.message)
    return 0


async def _serve(settings: RouterSettings, *, as_json: bool) -> None:
    def ready(listening: Listening) -> None:
        if as_json:
            print(json.dumps(asdict(listening) | {"pid": os.getpid()}), flush=True)
        else:
            print(
                f"{listening.router}: gRPC on {listening.grpc}, HTTP on {listening.http}, admin on {listening.admin}",
                flush=True,
            )

    await RouterProcess(settings).run(ready)


if __name__ == "__main__":
    sys.exit(main())
