"""Plots of a comparison: hits against the TTFT's tail, and how evenly the work is spread, for each policy.

Knows figures only; the one file that needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.simulate.report import Figures

FORMATS = ("svg", "png")


def write_plots(found: Mapping[str, Figures], folder: Path) -> None:
    """Write each plot to `folder`, which is made, in each of `FORMATS`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, one in found.items():
        axes.scatter(one.hit_ratio, one.ttft_p99_s, color="#c1440e" if name == "pando" else "#1b6ca8")
        axes.annotate(name, (one.hit_ratio, one.ttft_p99_s), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="hits / hits of an endless cache", ylabel="TTFT p99, s", yscale="log", title="Hits and tail")
    axes.grid(alpha=0.3)
    _save(figure, folder / "hits_and_tail")

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(found), [one.max_over_mean_work for one in found.values()], color="#2a7f3f")
    axes.invert_yaxis()
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set(xlabel="most work of a worker / mean", title="Balance")
    _save(figure, folder / "balance")


def _save(figure: object, path: Path) -> None:
    for kind in FORMATS:
        figure.savefig(path.with_suffix(f".{kind}"))  # type: ignore[attr-defined]
