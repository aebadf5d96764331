"""`pando demo`: the flags, the progress bar and the exit code around `bench.demo`.

Knows the terminal; stdout carries the result alone, progress goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from pando.command_line import add_settings, or_fail, read_settings
from pando.commands.serve import say, supervised
from pando.settings import UpSettings, narrow

_FLAGS = frozenset({"model", "workers", "runner", "device", "dtype", "threads", "device_blocks", "ready_timeout_s"})
_DEVICE_BLOCKS = 2048  # holds every request of a wave without reuse, so that neither run waits for memory


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando demo`."""
    add_settings(parser, UpSettings, omit={f.name for f in dataclasses.fields(UpSettings)} - _FLAGS)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")


def demo(given: argparse.Namespace) -> int:
    """Exit code 0 when every shared block was found and TTFT met its goal."""
    settings = or_fail("pando demo", lambda: read_settings(UpSettings, given))
    settings = narrow(
        UpSettings,
        settings,
        host="127.0.0.1",
        port=0,
        http_port=0,
        admin_port=0,
        tenants="",
        redis="",
        ray="",
        cluster="demo",
        device_blocks=settings.device_blocks or _DEVICE_BLOCKS,
    )
    return supervised("pando demo", lambda out: _demo(settings, out, as_json=given.json))


def _demo(settings: UpSettings, out: TextIO, *, as_json: bool) -> int:
    from control.checks import check

    check(settings)
    from bench.demo import compare, document, summary, table
    from bench.workload import Shape

    comparison = compare(settings, Shape(), say, _progress)
    if as_json:
        print(json.dumps(document(comparison)), file=out)
    else:
        _show(table(comparison), summary(comparison), out)
    return 0 if comparison.ok else 1


def _show(table: Any, lines: list[str], out: TextIO) -> None:
    from rich.console import Console

    console = Console(file=out)
    if not console.is_terminal:
        console = Console(file=out, width=120)
    console.print()
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[object], None]]:
    """A bar on a terminal, one line at the end elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda answer: None
        say(f"{title}: {total} requests answered")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda answer: bar.advance(task)
