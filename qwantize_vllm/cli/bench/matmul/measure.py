"""Everything that `qwantize bench matmul` measures, one cell of the tables after another."""

from __future__ import annotations

import dataclasses
import functools

import torch
from tqdm import tqdm

from qwantize_vllm.cli.bench.clock import copy_bytes_per_second
from qwantize_vllm.cli.bench.graph_clock import copies_beyond_cache, mean_cell, there_and_back, time_call
from qwantize_vllm.cli.bench.inputs import random_activations, random_weight
from qwantize_vllm.cli.bench.matmul.competitors import Competitor, Multiply
from qwantize_vllm.cli.bench.matmul.error import (
    LARGEST_RELATIVE_ERROR,
    exact_product,
    relative_error,
    sampled_rows,
)
from qwantize_vllm.cli.bench.shapes import Layer
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.search.quantize import quantize_nvfp4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and on what.

    Attributes:
        tokens: every M, in rising order.
        competitors: the dense one first.
        missing: the peers that cannot run here, and why.
    """

    layers: list[Layer]
    tokens: list[int]
    competitors: list[Competitor]
    missing: dict[str, str]
    block_size: int
    dtype: torch.dtype
    device: torch.device
    check: bool

    def of_kind(self, *kinds: str) -> list[str]:
        return [competitor.name for competitor in self.competitors if competitor.kind in kinds]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of the tables.

    Attributes:
        copies, weight_bytes: how many copies of the weight took turns, and bytes that a call reads of one.
        us: microseconds of a call, the mean of two times that it was timed; None where there is a problem, or nothing
            to multiply.
        of_copy: bytes of the weight a second, over the bandwidth of a copy.
        method, no_graph: see `graph_clock.Timing`.
        error: relative error against float64, None where it was not checked.
        cannot: why this competitor does not multiply so many tokens.
        problem: what it raised.
    """

    layer: Layer
    tokens: int
    competitor: str
    kind: str
    copies: int
    weight_bytes: int
    us: float | None = None
    of_copy: float | None = None
    method: str | None = None
    no_graph: str | None = None
    error: float | None = None
    cannot: str | None = None
    problem: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether the error is too large."""
        return self.error is not None and self.error > LARGEST_RELATIVE_ERROR


@dataclasses.dataclass
class Results:
    """copy: bytes read and written a second by a copy; the cells by layer, tokens and competitor."""

    copy: float
    cells: list[Cell] = dataclasses.field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What must not be, in words: products of this package that are wrong, or were not computed."""
        words = []
        for cell in self.cells:
            place = f"{cell.layer} M={cell.tokens} {cell.competitor}"
            if cell.kind == "ours" and cell.problem:
                words.append(f"{place} did not run: {cell.problem}")
            if cell.kind == "ours" and cell.wrong:
                words.append(f"{place}: relative error {cell.error:.2e}, allowed {LARGEST_RELATIVE_ERROR:.0e}")
        return words


def measure(plan: Plan) -> Results:
    """The bandwidth of a copy first, then every layer with every number of tokens and every competitor.

    Competitors are timed in their order and once more in the reverse; a figure is the mean.
    """
    results = Results(copy_bytes_per_second(plan.device))
    with tqdm(total=len(plan.layers) * len(plan.tokens), unit="row", disable=None) as bar:  # none without a terminal
        for layer in plan.layers:
            q = quantize_nvfp4(random_weight(layer.shape, plan.dtype, plan.device), "naive", plan.block_size)
            entrants = [_Entrant(competitor, q, plan) for competitor in plan.competitors]
            x = random_activations(plan.tokens[-1], layer.shape[1], plan.dtype, plan.device)
            for tokens in plan.tokens:
                check = _Check(x[:tokens], q) if plan.check else None
                runs = [functools.partial(each.run, layer, x[:tokens], check, results.copy) for each in entrants]
                results.cells += [_mean(*twice) for twice in there_and_back(runs)]
                bar.update()
    return results


class _Check:
    """The exact values of a sample of the rows of x . W'."""

    def __init__(self, x: torch.Tensor, q: Nvfp4Tensor) -> None:
        self._rows = sampled_rows(x.shape[0], x.device)
        self._exact = exact_product(x[self._rows], q)

    def error(self, y: torch.Tensor) -> float:
        return relative_error(y[self._rows], self._exact)


class _Entrant:
    """A competitor that has prepared its copies of a weight, or an exception."""

    def __init__(self, competitor: Competitor, q: Nvfp4Tensor, plan: Plan) -> None:
        self.competitor, self.device = competitor, plan.device
        self.bytes = competitor.weight_bytes(q, plan.dtype)
        self.copies: list[Multiply] = []
        self.problem: str | None = None
        try:
            for _ in range(copies_beyond_cache(self.bytes, plan.device)):
                self.copies.append(competitor.prepare(_copy(q), plan.dtype))
        except Exception as error:  # whatever a competitor raises belongs in the table, and must not end the run
            self.copies, self.problem = [], f"{_words(error)} (while preparing the weight)"

    def run(self, layer: Layer, x: torch.Tensor, check: _Check | None, copy: float) -> Cell:
        who = (self.competitor.name, self.competitor.kind)
        cell = Cell(layer, x.shape[0], *who, len(self.copies), self.bytes)
        if reason := self.competitor.cannot(x):
            return dataclasses.replace(cell, cannot=reason)
        if self.problem:
            return dataclasses.replace(cell, problem=self.problem)
        try:
            y = self.copies[0](x)
            error = check.error(y) if check else None
            del y
            timing = time_call([functools.partial(multiply, x) for multiply in self.copies], self.device)
        except Exception as failure:
            return dataclasses.replace(cell, problem=_words(failure))
        return dataclasses.replace(
            cell,
            us=1e6 * timing.seconds,
            of_copy=self.bytes / timing.seconds / copy,
            method=timing.method,
            no_graph=timing.no_graph,
            error=error,
        )


def _mean(first: Cell, second: Cell) -> Cell:
    """See `mean_cell`."""
    mean = mean_cell(first, second)
    if first.of_copy is None or first.us is None or mean.us is None:
        return mean
    return dataclasses.replace(mean, of_copy=first.of_copy * first.us / mean.us)


def _copy(q: Nvfp4Tensor) -> Nvfp4Tensor:
    return Nvfp4Tensor(q.codes.clone(), q.block_scales.clone(), q.global_scale.clone(), q.block_size)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
