"""Figures as text tables: one row a system or a batch size, one column a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """The median, with the least and the most where there are several; a dash for nothing."""
    if not values:
        return "-"
    scaled = [factor * value for value in values]
    middle = number(statistics.median(scaled), digits)
    if len(scaled) == 1:
        return middle
    return f"{middle} ({number(min(scaled), digits)} to {number(max(scaled), digits)})"


def number(value: float | None, digits: int) -> str:
    """With separators; a dash for nothing."""
    return "-" if value is None else f"{value:,.{digits}f}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that reads well as it is."""
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, body)])
