"""`pando prefixes list|publish|delete`: prompt heads that a tenant shares, through the Python client.

Knows the client and the terminal. stdout carries what was asked for alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pando.client import Client, Prefix
from pando.commands.talk import add_target, open_client
from pando.errors import ConfigError


def add_prefixes(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando prefixes`."""
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    listed = actions.add_parser("list", help="show the prefixes that the tenant may use")
    published = actions.add_parser("publish", help="share a prompt head for some time")
    _add_publish(published)
    deleted = actions.add_parser("delete", help="end prefixes that the tenant published")
    deleted.add_argument("id", nargs="+", help="what `list` shows")
    for action in (listed, published):
        action.add_argument("--json", action="store_true", help="print one JSON document")
    for action in (listed, published, deleted):
        add_target(action)


def prefixes(given: argparse.Namespace) -> int:
    """Do what was asked."""
    act: dict[str, Callable[[Client, argparse.Namespace], None]] = {
        "list": _list,
        "publish": _publish,
        "delete": _delete,
    }
    with open_client(given) as client:
        act[given.action](client, given)
    return 0


def _add_publish(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="TEXT", help="the head of a text prompt; '-' reads it from standard input")
    what.add_argument("--file", metavar="FILE", help="a file that holds the head of a text prompt")
    what.add_argument("--system", metavar="TEXT", help="the system message that begins a chat; '-' reads it")
    parser.add_argument("--scope", choices=("own", "group", "public"), default="own", help="who may use it")
    parser.add_argument("--group", default="", metavar="NAME", help="which of the tenant's groups, for --scope group")
    parser.add_argument("--name", default="", help="a name to find it by")
    parser.add_argument("--ttl", type=float, default=3600.0, metavar="S", help="seconds until it ends")
    parser.add_argument("--copies", type=int, default=0, metavar="N", help="workers that shall hold it")
    parser.add_argument("--no-warm", action="store_true", help="leave computing it to the first request")


def _list(client: Client, given: argparse.Namespace) -> None:
    _show(client.list_prefixes(timeout=given.timeout), as_json=given.json)


def _publish(client: Client, given: argparse.Namespace) -> None:
    published = client.publish_prefix(
        **_head(given),
        scope=given.scope,
        group=given.group,
        name=given.name,
        ttl_s=given.ttl,
        copies=given.copies,
        warm=not given.no_warm,
        timeout=given.timeout,
    )
    if given.json:
        print(json.dumps(asdict(published)))
    else:
        print(published.id)


def _delete(client: Client, given: argparse.Namespace) -> None:
    for prefix_id in given.id:
        client.delete_prefix(prefix_id, timeout=given.timeout)


def _head(given: argparse.Namespace) -> dict[str, Any]:
    if given.system is not None:
        return {"chat": [{"role": "system", "content": _read(given.system)}]}
    if given.text is not None:
        return {"text": _read(given.text)}
    try:
        return {"text": Path(given.file).read_text("utf-8")}
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"cannot read {given.file}") from None


def _read(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _show(found: Sequence[Prefix], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(prefix) for prefix in found]))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("id", "name", "scope", "tokens", "copies", "expires"):
        table.add_column(column, no_wrap=True)
    for prefix in found:
        scope = prefix.scope + (f" {prefix.group}" if prefix.group else "")
        expires = datetime.fromtimestamp(prefix.expires, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        table.add_row(prefix.id, prefix.name, scope, str(prefix.num_tokens), str(prefix.copies), expires)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
