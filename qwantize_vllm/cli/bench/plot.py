"""The figure of `qwantize bench quantize`: how much of the copy bandwidth every search reaches."""

from __future__ import annotations

from pathlib import Path

from qwantize_vllm.cli.bench.measure import Row

_COLORS = {"naive": "#4c78a8", "optimal": "#54a24b", "hessian": "#e45756"}


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Write a PNG: a bar for each layer and search, the milliseconds beside it.

    A bar is the search alone; its dark part is the whole way, with the pass that finds the global scale.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # optional; without pyplot it needs no display and keeps no state

    layers = list(dict.fromkeys(row.layer for row in rows))
    searches = list(dict.fromkeys(row.search for row in rows))
    height = 0.8 / len(searches)
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        y = layers.index(row.layer) + (searches.index(row.search) - (len(searches) - 1) / 2) * height
        color = _COLORS.get(row.search)
        search, whole = 100 * row.search_of_copy, 100 * row.whole_of_copy
        axes.barh(y, search, height * 0.9, color=color, alpha=0.4)
        axes.barh(y, whole, height * 0.9, color=color, label=row.search if row in _first_of_each(rows) else None)
        axes.text(max(search, whole), y, f" {row.search_ms:.3g} ms, {row.whole_ms:.3g} with amax", va="center", size=7)
    axes.set_yticks(range(len(layers)), ["\n".join(str(layer).rsplit(" ", 1)) for layer in layers], size=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("% of copy bandwidth (light: the search alone; dark: with the amax pass)")
    axes.set_title(title, size=10)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _first_of_each(rows: list[Row]) -> list[Row]:
    """One row for each search: the legend names each once."""
    return list({row.search: row for row in reversed(rows)}.values())
