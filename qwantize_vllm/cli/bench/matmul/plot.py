"""The figure of `qwantize bench matmul`: how many times as fast as the dense layer everyone is, by number of tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qwantize_vllm.cli.bench.matmul.measure import Plan
from qwantize_vllm.cli.bench.matmul.summary import Row, times_as_fast

_COLUMNS = 3


def plot(path: Path, plan: Plan, rows: list[Row], title: str) -> None:
    """Write a PNG: a panel a layer, a line a competitor; peers are dashed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # optional; without pyplot it needs no display and keeps no state

    width = min(len(plan.layers), _COLUMNS)
    height = math.ceil(len(plan.layers) / width)
    figure = Figure(figsize=(1 + 4 * width, 1 + 3.2 * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False).flatten()
    for layer, axes in zip(plan.layers, panels, strict=False):
        _panel(axes, plan, [row for row in rows if row.layer == layer])
        axes.set_title(str(layer), size=10)
    for axes in panels[len(plan.layers) :]:
        axes.set_visible(False)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, plan: Plan, rows: list[Row]) -> None:
    dense = plan.competitors[0].name
    for competitor in plan.competitors[1:]:
        ratios = [times_as_fast(plan, row, competitor.name) or math.nan for row in rows]
        style = "--" if competitor.kind == "peer" else "-"
        axes.plot([row.tokens for row in rows], ratios, style, marker="o", markersize=3, label=competitor.name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(plan.tokens, list(map(str, plan.tokens)), size=7, rotation=60)
    axes.set_xlabel("M (tokens)", size=8)
    axes.set_ylabel(f"times as fast as {dense}", size=8)
