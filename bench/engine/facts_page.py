"""What `docs/kv-cache.md` shows of measured facts: tables, sentences with figures, plots.

Knows the document that `python -m bench.engine facts --json` writes, and measures nothing: the same document gives the
same page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.chart import Line, bar_chart, line_chart
from bench.engine.tables import markdown, number

Document = Mapping[str, Any]
GIB = 1 << 30


def plots(document: Document) -> dict[str, str]:
    """SVG by the name of its file."""
    drawn = {"kv-cache-time.svg": _draw_times(document), "kv-cache-bytes.svg": _draw_bytes(document["kv_bytes"][-1])}
    for count, load in enumerate(document["loads"], 1):
        drawn[f"kv-cache-sequences-{count}.svg"] = _draw_load(load)
    return drawn


def text(document: Document) -> list[str]:
    """Paragraphs and tables in markdown, each as it stands on the page."""
    parts = [_machine(document), time_table(document["token_times"]), _time_in_words(document["token_times"])]
    for load in document["loads"]:
        parts += [_load_in_words(load), load_table(load["pools"])]
    parts.append(bytes_table(document["kv_bytes"]))
    return parts


def time_table(times: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds for the next token: the least of all rounds, and how far it was from others."""
    head = ["tokens before it", "with a cache, ms", "median, most", "without, ms", "median, most", "ratio"]
    body = []
    for one in times:
        cells = [f"{one['length']:,}"]
        for way in (one["cached"], one["uncached"]):
            cells += [number(way["least"], 1), f"{number(way['median'], 1)}, {number(way['most'], 1)}"]
        body.append([*cells, number(one["ratio"], 0)])
    return markdown(head, body)


def load_table(pools: Sequence[Mapping[str, Any]]) -> str:
    """Sequences at once in each pool."""
    head = ["positions", "longest reserved", "own length reserved", "paged", "of longest", "prefixes shared"]
    return markdown(
        head,
        [
            [
                f"{one['positions']:,}",
                *(number(one[way], 1) for way in ("reserved", "known", "paged")),
                f"{one['paged'] / one['reserved']:.2f} x",
                number(one["shared"], 1),
            ]
            for one in pools
        ],
    )


def bytes_table(models: Sequence[Mapping[str, Any]]) -> str:
    """Bytes of a token by dtype, against bfloat16."""
    body = []
    for model in models:
        base = next(one["bytes_per_token"] for one in model["dtypes"] if one["dtype"] == "bfloat16")
        for one in model["dtypes"]:
            size = one["bytes_per_token"]
            body.append([model["model"], one["dtype"], number(size, 0), f"{size / base:.3f} x", f"{GIB / size:,.0f}"])
    return markdown(["model", "KV dtype", "bytes a token", "of bfloat16", "tokens in a GiB"], body)


def _machine(document: Document) -> str:
    machine = document["machine"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{document['model']}, {machine['dtype']}, {document['device']}: {machine['name']}, "
        f"{threads}, torch {machine['torch_version']}; load average "
        f"{machine['load_average']:.1f} before the run."
    )


def _time_in_words(times: Sequence[Mapping[str, Any]]) -> str:
    first, last = times[0], times[-1]
    grown = {way: last[way]["least"] / first[way]["least"] for way in ("cached", "uncached")}
    return (
        f"From {first['length']:,} to {last['length']:,} tokens the time for the next one grows {grown['cached']:.1f} "
        f"times with a cache and {grown['uncached']:.1f} times without. At {last['length']:,} a token without takes "
        f"{last['ratio']:.0f} times as long."
    )


def _load_in_words(load: Mapping[str, Any]) -> str:
    return (
        f"{load['name']}: {load['requests']:,} requests, {load['mean']:,.0f} tokens on average with their answers, "
        f"{load['longest']:,} at most."
    )


def _draw_times(document: Document) -> str:
    ways = {"without a KV cache: all tokens again": "uncached", "with a KV cache": "cached"}
    return line_chart(
        [Line(name, [(t["length"], t[way]["least"]) for t in document["token_times"]]) for name, way in ways.items()],
        title=f"Milliseconds for the next token: {document['model']}, {document['machine']['dtype']}",
        x_label="tokens before it",
    )


def _draw_load(load: Mapping[str, Any]) -> str:
    ways = {
        "paged, shared prefixes held once": "shared",
        "paged": "paged",
        "own length reserved, were it known": "known",
        f"{load['longest']:,} positions reserved for each": "reserved",
    }
    lines = [
        Line(name, [(one["positions"], one[way]) for one in load["pools"]])
        for name, way in ways.items()
        if load["pools"][0][way] is not None
    ]
    return line_chart(lines, title=f"Sequences at once: {load['name']}", x_label="token positions in the pool")


def _draw_bytes(model: Mapping[str, Any]) -> str:
    bars = [(one["dtype"], one["bytes_per_token"]) for one in model["dtypes"]]
    return bar_chart(bars, title=f"KV bytes of a token: {model['model']}")
