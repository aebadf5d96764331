"""Figures as text tables: one row a system or a batch size, one column a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cell = str | float | int | None

_COMPARISON = (
    ("tokens/s", "workload_tokens_per_s", 0),
    ("TTFT p50 s", "ttft_p50_s", 2),
    ("TTFT p99 s", "ttft_p99_s", 2),
    ("no reuse: tokens/s", "without_tokens_per_s", 0),
    ("TTFT p50 s", "without_ttft_p50_s", 2),
    ("TTFT p99 s", "without_ttft_p99_s", 2),
    ("decode batch 1", "decode_tokens_per_s", 1),
    ("prefill 4,096", "prefill_tokens_per_s", 0),
)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians of all systems; what a system cannot do is a dash."""
    head = ["system", *(name for name, _, _ in _COMPARISON)]
    body = [[row["name"], *(number(row[key], digits) for _, key, digits in _COMPARISON)] for row in rows]
    return markdown(head, body)


def number(value: float | None, digits: int) -> str:
    """With separators; a dash for nothing."""
    return "-" if value is None else f"{value:,.{digits}f}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that reads well as it is."""
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, body)])
