"""`pando up`, `pando workers` and `pando router`: the commands that run until they are told to end.

Knows the order of starting and ending; the parts are `control`'s. Whatever happens, no child is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from pando.command_line import add_settings, or_fail, read_settings
from pando.commands.interrupt import Interrupted, interruptible
from pando.errors import ConfigError, PandoError
from pando.settings import (
    ENV_PREFIX,
    CrewSettings,
    RouterSettings,
    UpSettings,
    WorkerSettings,
    narrow,
    secrets,
    to_flags,
)

if TYPE_CHECKING:
    from control.stack import Running

_TEND_EVERY_S = 1.0
_ROUTERS_READY_S = 60.0
_PROMPT = "Return a list of"  # the built-in model knows Python's documentation


def add_up(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando up`."""
    add_settings(parser, UpSettings, omit=("worker_id", "worker_port", "router_id", "placement", "reuse_port"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, and nothing else")


def up(given: argparse.Namespace) -> int:
    """Everything on one machine, until SIGINT or SIGTERM."""
    settings = or_fail("pando up", lambda: read_settings(UpSettings, given))
    return supervised("pando up", lambda out: _up(settings, out, as_json=given.json))


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando workers`."""
    add_settings(parser, CrewSettings, omit=("worker_id", "worker_port"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, and nothing else")


def workers(given: argparse.Namespace) -> int:
    """Workers alone, until SIGINT or SIGTERM."""
    settings = or_fail("pando workers", lambda: read_settings(CrewSettings, given))
    return supervised("pando workers", lambda out: _workers(settings, out, as_json=given.json))


def add_router(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando router`."""
    add_settings(parser, RouterSettings)
    parser.add_argument("--json", action="store_true", help="print one line of JSON when it listens")


def router(given: argparse.Namespace) -> int:
    """A router alone, in this process: the same as `python -m router`. Or several, each in a process of its own."""
    from router.__main__ import main

    settings = or_fail("pando router", lambda: read_settings(RouterSettings, given))
    if settings.processes != 1:
        return supervised("pando router", lambda out: _routers(settings, out, as_json=given.json))
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]  # what they said is in the settings
    os.environ.update(secrets(settings))
    return main(to_flags(settings) + (["--json"] if given.json else []))


def supervised(prog: str, work: Callable[[TextIO], int]) -> int:
    """Run `work` so that a signal or an error ends every process below this one; gives the exit code.

    `work` is given standard output: what else prints there, as Ray does when a process ends, goes nowhere.
    """
    from control.children import adopt_orphans, end_descendants
    from control.router_process import RouterRefused

    adopt_orphans()
    try:
        with interruptible(), open(os.devnull, "w", encoding="utf-8") as nowhere:
            out = sys.stdout
            with contextlib.redirect_stdout(nowhere):
                return work(out)
    except Interrupted as interrupted:
        return interrupted.exit_code
    except RouterRefused:
        return 2
    except PandoError as error:
        print(f"{prog}: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        end_descendants()


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def say_nothing(line: str) -> None:
    """No progress."""


def _up(settings: UpSettings, out: TextIO, *, as_json: bool) -> int:
    from control.checks import check

    check(settings)
    from control.stack import Stack  # loads Ray, which the mistakes found above need not wait for

    stack = Stack(settings, say_nothing if as_json else say)
    began = time.monotonic()
    try:
        running = stack.start()
        if as_json:
            print(json.dumps(running.to_json()), file=out, flush=True)
        else:
            print("\n".join(greeting(settings, running, time.monotonic() - began)), file=out, flush=True)
        return _until_interrupted(stack.tend)
    finally:
        stack.stop()


def greeting(settings: UpSettings, running: Running, seconds: float) -> list[str]:
    """What a person reads when all is up: where it listens, and lines to paste into another shell."""
    target = running.grpc.replace("0.0.0.0", "127.0.0.1")
    where = f"gRPC on {running.grpc}, HTTP on {running.http}, admin on {running.admin}"
    key = " --api-key KEY" if settings.tenants else ""
    lines = [
        f"ready after {seconds:.1f} s: {where}",
        "",
        f"  {program()} generate {shlex.quote(_PROMPT)} --max-tokens 32 --target {target}{key}",
    ]
    if settings.reflection == "on":
        request = shlex.quote(json.dumps({"text": _PROMPT, "sampling": {"max_tokens": 32}}))
        header = " -H 'authorization: Bearer KEY'" if settings.tenants else ""
        lines.append(f"  grpcurl -plaintext{header} -d {request} {target} pando.v1.Inference/GenerateStream")
    return [*lines, "", "Ctrl-C ends everything."]


def program() -> str:
    """How a shell starts this program: `pando` if that is it, else as it was started."""
    started = sys.argv[0]
    if os.path.basename(started) == "cli.py":
        return shlex.join([sys.executable, "-m", "pando.cli"])
    found = shutil.which("pando")
    if found and os.path.exists(started) and os.path.samefile(found, started):
        return "pando"
    return shlex.quote(started)


def _routers(settings: RouterSettings, out: TextIO, *, as_json: bool) -> int:
    from control.router_group import RouterGroup

    group = RouterGroup(settings)
    try:
        group.start()
        listening = group.wait_listening(_ROUTERS_READY_S)
        if as_json:
            rows = [asdict(one) for one in listening]
            print(json.dumps({"grpc": rows[0]["grpc"], "routers": rows}), file=out, flush=True)
        else:
            say(f"{len(listening)} routers: gRPC on {listening[0].grpc}")
            for one in listening:
                say(f"  {one.router}: HTTP on {one.http}, admin on {one.admin}")
        return _until_interrupted(lambda: group.tend(lambda: say("a router ended: starting it again")))
    finally:
        group.stop()


def _workers(settings: CrewSettings, out: TextIO, *, as_json: bool) -> int:
    from control.checks import check_workers

    check_workers(settings)
    return _keep_workers(settings, out, as_json=as_json)


def _keep_workers(settings: CrewSettings, out: TextIO, *, as_json: bool) -> int:
    from control.cluster import Cluster, Crew

    cluster = Cluster(
        address=settings.ray,
        namespace=settings.cluster,
        slots=settings.workers,
        dashboard=settings.dashboard == "on",
    )
    crew = Crew(cluster, narrow(WorkerSettings, settings), settings.workers)
    try:
        cluster.start()
        crew.start()
        ready = crew.wait_ready(settings.ready_timeout_s, lambda found: None)
        rows = [{"id": w.worker_id, "epoch": w.epoch, "pid": w.pid, "grpc": w.address} for w in ready]
        if as_json:
            print(json.dumps({"ray": cluster.address, "workers": rows}), file=out, flush=True)
        else:
            say("ready: " + ", ".join(f"{row['id']} on {row['grpc']}" for row in rows))
        return _until_interrupted(crew.tend)
    finally:
        crew.stop()
        cluster.stop()


def _until_interrupted(tend: Callable[[], object]) -> int:
    """Until a signal; being told to end is how these commands end well."""
    try:
        while True:
            time.sleep(_TEND_EVERY_S)
            tend()
    except Interrupted:
        return 0
