"""Command lines derived from settings dataclasses: one flag a field, help and defaults from the field itself.

Knows argparse and `pando.settings`, nothing of what a command does. A mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pando import settings
from pando.errors import ConfigError

S = TypeVar("S")

USAGE_EXIT = 2


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something: not those of flags without a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False, "") else action.help


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, whose options are never abbreviated and whose help shows defaults."""

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("allow_abbrev", False)
        keywords.setdefault("formatter_class", _Formatter)
        super().__init__(**keywords)

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        fail(self.prog, message)


def fail(prog: str, message: str) -> NoReturn:
    """Say what is wrong in one line on stderr and leave with exit code 2."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(USAGE_EXIT)


def parse(
    cls: type[S],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    env: Mapping[str, str] | None = None,
) -> S:
    """Settings from a command line; leaves with one line and exit code 2 on any mistake.

    argv: the arguments without the program's name, None for the process's own. `--config FILE.toml` names a settings
    file; flags win over environment variables, those over the file, that over the defaults.
    """
    return parse_switches(cls, argv, {}, prog=prog, description=description, env=env)[0]


def parse_switches(
    cls: type[S],
    argv: Sequence[str] | None,
    switches: Mapping[str, str],
    *,
    prog: str,
    description: str,
    env: Mapping[str, str] | None = None,
) -> tuple[S, frozenset[str]]:
    """As `parse`, with flags beside the settings that take no value, as {"json": "its help"}; also gives those set."""
    parser = Parser(prog=prog, description=description)
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text, default=argparse.SUPPRESS)
    add_settings(parser, cls)
    given = parser.parse_args(argv)
    found = or_fail(prog, lambda: read_settings(cls, given, env=env))
    return found, frozenset(name for name in switches if name.replace("-", "_") in given)


def add_settings(parser: argparse.ArgumentParser, cls: type, *, omit: Collection[str] = ()) -> None:
    """A flag for each field of the settings class `cls`, less those in `omit`, and `--config`."""
    group = parser.add_argument_group("settings", "also from --config FILE.toml and PANDO_* variables; flags win")
    group.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="TOML file of settings")
    for f in dataclasses.fields(cls):
        if f.name not in omit:
            group.add_argument(f"--{f.name.replace('_', '-')}", **_flag(f))


def read_settings(cls: type[S], given: argparse.Namespace, *, env: Mapping[str, str] | None = None) -> S:
    """The settings that parsed arguments, the environment and the file of `--config` give; raises `ConfigError`."""
    flags = {f.name: getattr(given, f.name) for f in dataclasses.fields(cls) if f.name in given}  # type: ignore[arg-type]
    config = getattr(given, "config", None)
    return settings.load(cls, flags, toml=Path(config) if config else None, env=env)


def or_fail(prog: str, work: Callable[[], S]) -> S:
    """What `work` returns; a `ConfigError` it raises is one line on stderr and exit code 2."""
    try:
        return work()
    except ConfigError as error:
        fail(prog, error.message)


def _flag(f: dataclasses.Field[Any]) -> dict[str, Any]:
    text = f.metadata["help"].replace("%", "%%")
    if f.metadata["secret"]:
        text += f" (better by {settings.ENV_PREFIX}{f.name.upper()})"
    elif f.default != "":
        text += f" (default: {f.default})"
    keywords: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if f.metadata["choices"]:
        keywords["choices"] = f.metadata["choices"]
    else:
        keywords["metavar"] = {str: "TEXT", int: "N", float: "X"}[type(f.default)]
    return keywords
