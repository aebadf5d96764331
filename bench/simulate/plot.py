"""A plot of a comparison: hits, the TTFT's tail and how evenly the work is spread, for each policy.

Knows figures only; the one file that needs matplotlib. Equal figures give equal files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.simulate.report import Figures

FORMATS = ("svg", "png")
PANDO, OTHERS, BOUND = "#c1440e", "#1b6ca8", "#9a9a9a"
TEXT_ROOM = 1.25
"""The axis goes on behind the longest bar, for its number."""


def write_plot(found: Mapping[str, Figures], path: Path, title: str) -> None:
    """Write it to `path` in each of `FORMATS`, whose suffixes are added; the folder is made."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pando"})
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 0.9 + 0.32 * len(found)), layout="constrained")
    figure.suptitle(title)
    hits, tail, balance = figure.subplots(1, 3, sharey=True)
    names = list(found)
    _bars(hits, names, [one.hit_ratio for one in found.values()], "hits / hits of an endless cache", "{:.3f}")
    _bars(tail, names, [one.ttft_p99_s for one in found.values()], "TTFT p99, s", "{:,.2f}")
    _bars(balance, names, [one.max_over_mean_work for one in found.values()], "most work of a worker / mean", "{:.2f}")
    tails = [one.ttft_p99_s for one in found.values()]
    if max(tails) > 10 * min(tails) > 0:
        tail.set(xscale="log", xlabel="TTFT p99, s (log)", xlim=(min(tails) / 2, max(tails) * 3 * TEXT_ROOM))
    hits.invert_yaxis()
    for kind in FORMATS:
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(path.with_name(f"{path.name}.{kind}"), metadata=metadata)


def _bars(axes: Any, names: list[str], values: list[float], label: str, form: str) -> None:
    colours = [PANDO if name == "pando" else BOUND if name == "one_pool" else OTHERS for name in names]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.set(xlabel=label, xlim=(0, max(values) * TEXT_ROOM))
    axes.spines[["top", "right"]].set_visible(False)
