"""What the cells add up to: who is how many times as fast as the dense layer."""

from __future__ import annotations

import dataclasses
import statistics

from qwantize_vllm.cli.bench.matmul.measure import Cell, Plan
from qwantize_vllm.cli.bench.shapes import Layer

# The largest M of each range but the last, which has none: decoding, batches of it, prefill.
_RANGES = {"M 1-16": 16, "M 17-1024": 1024, "M above 1024": None}
RANGES = tuple(_RANGES)


@dataclasses.dataclass(frozen=True)
class Row:
    """All cells of one layer and one number of tokens.

    Attributes:
        over_dense: the dense layer's time over that of the fastest of this package.
        over_others: the time of the fastest other, dense layer or peer, over that of the fastest of this package.
    """

    layer: Layer
    tokens: int
    cells: dict[str, Cell]
    over_dense: float | None
    over_others: float | None


@dataclasses.dataclass(frozen=True)
class Line:
    """A competitor over all layers.

    Attributes:
        times_as_fast: geometric mean of the dense layer's time over its own, for each of RANGES.
        of_copy: of the bandwidth of a copy, at M = 1; geometric mean.
        largest_error: of all that was checked.
    """

    competitor: str
    times_as_fast: dict[str, float | None]
    of_copy: float | None
    largest_error: float | None


def rows(plan: Plan, cells: list[Cell]) -> list[Row]:
    """The cells by layer and tokens, with the ratios between the fastest ones."""
    found: dict[tuple[Layer, int], dict[str, Cell]] = {}
    for cell in cells:
        found.setdefault((cell.layer, cell.tokens), {})[cell.competitor] = cell
    return [_row(plan, layer, tokens, each) for (layer, tokens), each in found.items()]


def _row(plan: Plan, layer: Layer, tokens: int, cells: dict[str, Cell]) -> Row:
    def fastest(*kinds: str) -> float | None:
        times = [cells[name].us for name in plan.of_kind(*kinds)]
        return min((us for us in times if us), default=None)

    ours = fastest("ours")
    return Row(layer, tokens, cells, _ratio(fastest("dense"), ours), _ratio(fastest("dense", "peer"), ours))


def times_as_fast(plan: Plan, row: Row, competitor: str) -> float | None:
    """The dense layer's time over the competitor's, None where either was not measured."""
    return _ratio(row.cells[plan.of_kind("dense")[0]].us, row.cells[competitor].us)


def summarize(plan: Plan, found: list[Row]) -> list[Line]:
    """A line for each competitor."""
    return [_line(plan, found, competitor.name) for competitor in plan.competitors]


def _line(plan: Plan, found: list[Row], competitor: str) -> Line:
    ratios: dict[str, list[float | None]] = {name: [] for name in RANGES}
    for row in found:
        ratios[_range_of(row.tokens)].append(times_as_fast(plan, row, competitor))
    cells = [row.cells[competitor] for row in found]
    return Line(
        competitor,
        {name: _mean(each) for name, each in ratios.items()},
        _mean([cell.of_copy for cell in cells if cell.tokens == 1]),
        max((cell.error for cell in cells if cell.error is not None), default=None),
    )


def _range_of(tokens: int) -> str:
    return next(name for name, last in _RANGES.items() if last is None or tokens <= last)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _mean(figures: list[float | None]) -> float | None:
    known = [figure for figure in figures if figure]
    return statistics.geometric_mean(known) if known else None
