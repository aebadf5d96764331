"""The `pando` command: one parser, one row a subcommand, errors as one line.

Knows the names of the commands; what they do is in `pando.commands` and imported when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pando import __version__
from pando.command_line import Parser
from pando.errors import ConfigError, PandoError


@dataclass(frozen=True, slots=True)
class _Command:
    """`module` has `add_<name>(parser)` and `<name>(arguments) -> exit code`."""

    name: str
    module: str
    help: str


_COMMANDS = (
    _Command("up", "pando.commands.serve", "start everything on this machine: Redis, Ray, workers and a router"),
    _Command("generate", "pando.commands.talk", "send one prompt and stream the answer"),
    _Command("chat", "pando.commands.talk", "hold a conversation, a message a line"),
    _Command("prefixes", "pando.commands.prefixes", "list, publish or delete prompt heads that are shared"),
    _Command("status", "pando.commands.look", "show workers, tenants and totals of a running fleet"),
    _Command("explain", "pando.commands.look", "show why a recent request went to its worker"),
    _Command(
        "demo", "pando.commands.demo", "run a multi-tenant workload on two workers, with prefix reuse and without"
    ),
    _Command("key", "pando.commands.key", "make an API key for a tenant, and its lines for the tenants file"),
    _Command("router", "pando.commands.serve", "run a router alone"),
    _Command("workers", "pando.commands.serve", "run workers alone, in a Ray of their own or one to join"),
    _Command("health", "pando.commands.look", "tell by exit code whether a router serves"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code: 0 well, 1 failed, 2 asked wrongly, 128 + n ended by signal n."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for command in _COMMANDS:
        if arguments[:1] == [command.name]:
            return _run(command, arguments[1:])
    _overview().parse_args(arguments)
    _overview().print_help()
    return 0


def _run(command: _Command, arguments: Sequence[str]) -> int:
    module = importlib.import_module(command.module)
    parser = Parser(prog=f"pando {command.name}", description=command.help[0].upper() + command.help[1:] + ".")
    getattr(module, f"add_{command.name}")(parser)
    given = parser.parse_args(arguments)
    try:
        code: int = getattr(module, command.name)(given)
        sys.stdout.flush()
        return code
    except PandoError as error:
        print(f"{parser.prog}: {' '.join(error.message.split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _overview() -> argparse.ArgumentParser:
    """The parser for what comes before or instead of a command."""
    parser = Parser(
        prog="pando",
        description="Multi-tenant LLM serving with prefix-cache sharing.",
        epilog="`pando COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"pando {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in _COMMANDS:
        commands.add_parser(command.name, help=command.help)
    return parser


if __name__ == "__main__":
    sys.exit(main())
