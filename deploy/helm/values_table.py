"""Writes the table of values in the chart's README from the comments of values.yaml.

Knows the form `# -- text` above a key. Run it after changing values.yaml; a test compares the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "pando"
BEGIN, END = "<!-- values begin -->", "<!-- values end -->"


def described(text: str) -> Iterator[tuple[str, str]]:
    """Dotted key and description of every commented key, in order."""
    path: list[tuple[int, str]] = []
    comment = ""
    for line in text.splitlines():
        if found := re.match(r"\s*# -- (.*)", line):
            comment = found[1]
        elif found := re.match(r"( *)([A-Za-z]\w*):", line):
            indent = len(found[1])
            path = [(depth, key) for depth, key in path if depth < indent]
            path.append((indent, found[2]))
            if comment:
                yield ".".join(key for _, key in path), comment
            comment = ""


def table(text: str) -> str:
    """The Markdown table."""
    values = yaml.safe_load(text)
    rows = ["| Value | Default | What it is |", "|---|---|---|"]
    for key, comment in described(text):
        default = json.dumps(_at(values, key))
        rows.append(f"| `{key}` | `{default}` | {comment.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def readme_with(readme: str, text: str) -> str:
    """`readme` with its table replaced by that of the values file `text`."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(text)}\n{END}{after}"


def _at(values: dict[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


if __name__ == "__main__":
    page = CHART / "README.md"
    page.write_text(readme_with(page.read_text(), (CHART / "values.yaml").read_text()))
