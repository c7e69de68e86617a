"""The figure of `qwantize eval`: perplexity and KL divergence by setting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qwantize_vllm.cli.setting_names import short_names

_COLOR, _BASE_COLOR = "#4c78a8", "#888888"


def plot(path: Path, records: dict[str, dict[str, Any]], title: str) -> None:
    """Write a PNG: a point for each setting, bars of one standard error on either side.

    The error of a perplexity is that of its ratio to the first record's, window by window, so that record has none.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # optional; without pyplot it needs no display and keeps no state

    panels = [_perplexities(records)]
    if any(record["kl"] is not None for record in records.values()):
        panels.append(_divergences(records))
    figure = Figure(figsize=(5 * len(panels) + 1, 1.6 + 0.35 * len(records)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (label, form, points) in zip(axes, panels, strict=True):
        for y, point in enumerate(points):
            if point is None:
                continue
            value, low, high = point
            color = _COLOR if y else _BASE_COLOR
            panel.errorbar([value], [y], xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=4)
            panel.annotate(form.format(value), (value, y), (0, 7), textcoords="offset points", ha="center", size=8)
        panel.set_xlabel(label)
        panel.margins(x=0.12)
        panel.grid(axis="x", alpha=0.3)
    axes[0].axvline(panels[0][2][0][0], color=_BASE_COLOR, linestyle=":", linewidth=1)
    axes[0].set_yticks(range(len(records)), short_names(records).values())
    axes[0].set_ylim(len(records) - 0.5, -0.6)
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=150)


_Panel = tuple[str, str, list[Any]]  # label; form of its values; for each record its value and its bar's ends, or None


def _perplexities(records: dict[str, dict[str, Any]]) -> _Panel:
    points = []
    for record in records.values():
        value, error = record["perplexity"], _finite(record["log_ratio_standard_error"])
        points.append((value, value * math.exp(-error), value * math.exp(error)))
    return "perplexity", "{:.2f}", points


def _divergences(records: dict[str, dict[str, Any]]) -> _Panel:
    points: list[Any] = []
    for record in records.values():
        value, error = record["kl"], _finite(record["kl_standard_error"])
        points.append(None if value is None else (value, value - error, value + error))
    return f"KL divergence from {next(iter(records))}, nats a token", "{:.4f}", points


def _finite(error: float | None) -> float:
    """0 where there is no error: of the first record, or of a single window."""
    return 0.0 if error is None or math.isnan(error) else error
