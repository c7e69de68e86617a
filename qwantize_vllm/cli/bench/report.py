"""What `qwantize bench quantize` says: two tables, and everything in them as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwantize_vllm.cli.bench.compare import Comparison
from qwantize_vllm.cli.bench.inputs import SEED, TOKENS, WEIGHT_STD
from qwantize_vllm.cli.bench.machine import device_name, versions
from qwantize_vllm.cli.bench.measure import Plan, Results, Row
from qwantize_vllm.cli.bench.output import digits, make_table


def show(plan: Plan, results: Results, console: Console) -> None:
    """Print both tables, how many blocks were as promised, and what was not."""
    console.print(f"copy: {results.copy / 1e9:.0f} GB/s read and written")
    console.print(
        f"blocks of {plan.block_size}, random {_settings(plan)['dtype']} weights, on {device_name(plan.device)}:"
    )
    console.print(_searches_table(results.rows))
    if results.comparisons:
        console.print("peers, both sides with the global scale 1; larger: on how many blocks:")
        console.print(_peers_table(results.comparisons))
    for note in [*_counts(plan, results.rows), *_ties(results.comparisons)]:
        console.print(note)
    for failure in results.failures:
        console.print(failure, style="red")


def write_json(path: Path, plan: Plan, results: Results) -> None:
    """Every figure of both tables, unrounded, with the device, the versions and the settings."""
    document = {
        "device": device_name(plan.device),
        "versions": versions(),
        "settings": _settings(plan),
        "copy_gb_per_s": results.copy / 1e9,
        "searches": [dataclasses.asdict(row) for row in results.rows],
        "peers": [dataclasses.asdict(line) for line in results.comparisons],
        "failures": results.failures,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "backend": "triton" if plan.device.type == "cuda" else "reference",
        "dtype": str(plan.dtype).removeprefix("torch."),
        "block_size": plan.block_size,
        "global_scale": plan.global_scale,
        "check_blocks": plan.check_blocks,
        "weight_std": WEIGHT_STD,
        "hessian_tokens": TOKENS,
        "seed": SEED,
    }


def _searches_table(rows: list[Row]) -> Table:
    table = make_table(
        ("layer", "search"),
        ("search\nms", "\nGB/s", "% of\ncopy", "with amax\nms", "% of\ncopy", "blocks\nright"),
    )
    for row in rows:
        search = digits(row.search_ms, row.search_gb_per_s, 100 * row.search_of_copy)
        whole = digits(row.whole_ms, 100 * row.whole_of_copy)
        table.add_row(str(row.layer), row.search, *search, *whole, f"{row.kept}/{row.checked}")
    return table


def _peers_table(comparisons: list[Comparison]) -> Table:
    table = make_table(
        ("layer", "search", "peer"),
        ("its\nms", "our\nms", "times\nas fast", "blocks\nchecked", "its error\nlarger", "our error\nlarger"),
    )
    for line in comparisons:
        names = (str(line.layer), line.search, line.peer)
        if line.error:
            table.add_row(*names[:2], f"{line.peer} did not run: {line.error}")
            continue
        figures = digits(line.peer_ms, line.our_ms, line.times_as_fast)
        table.add_row(*names, *figures, *map(str, (line.checked, line.peer_larger, line.ours_larger)))
    return table


_PROMISES = {"naive": "at snap(amax/6)", "hessian+codes": "no worse than the optimal scale with the nearest codes"}


def _counts(plan: Plan, rows: list[Row]) -> Iterator[str]:
    for search in plan.searches:
        mine = [row for row in rows if row.search == str(search)]
        kept, checked = sum(row.kept for row in mine), sum(row.checked for row in mine)
        yield f"{search}: {kept} of {checked} blocks {_PROMISES.get(str(search), 'optimal')}"


def _ties(comparisons: list[Comparison]) -> Iterator[str]:
    """A peer's errors that are smaller though its scales are not better."""
    for line in comparisons:
        if line.peer_smaller_by_ties:
            yield (
                f"{line.layer} {line.search}: on {line.peer_smaller_by_ties} blocks {line.peer} has the smaller error "
                "only because it rounds midpoints otherwise than NVIDIA's hardware"
            )
