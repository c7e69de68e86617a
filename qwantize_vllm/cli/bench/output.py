"""How the benchmarks print figures and draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


def make_table(texts: Iterable[str], figures: Iterable[str], title: str | None = None) -> Table:
    """Columns of texts, then of figures. Texts wrap where the terminal is narrow, figures never do."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, title=title, title_justify="left")
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def digits(*figures: float | None) -> list[str]:
    """Three digits each, without an exponent: from microseconds to minutes, from one percent to a thousandth of it."""
    return [f"{figure:.{max(0, 2 - math.floor(math.log10(figure)))}f}" if figure else "" for figure in figures]


def draw(png: Path, plot: Callable[[Path], None], json: Path, console: Console) -> None:
    """Write the plot if matplotlib is there, and say which files have been written; the JSON was before."""
    try:
        plot(png)
    except ImportError as error:
        console.print(f"wrote {json}; no plot: {error} (pip install matplotlib)")
    else:
        console.print(f"wrote {json} and {png}")
