#!/usr/bin/env python3
"""Time the search kernels in every launch shape on this GPU, and print the entries of their tables.

    .venv/bin/python scripts/tune_search.py

NAIVE_SHAPES and OPTIMAL_SHAPES in qwantize_vllm/search/triton_sse.py, HESSIAN_SHAPES in triton_hessian.py and
CODES_SHAPES in triton_codes.py map the major version of the compute capability to the shape of a launch; paste the
lines that this prints. The times of codes have the search before it in them. Nothing is tuned at load time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.cli.bench.clock import median_seconds
from qwantize_vllm.cli.bench.inputs import random_hessian, random_weight
from qwantize_vllm.search import triton_codes, triton_hessian, triton_sse
from qwantize_vllm.search.quantize import Refine, ScaleSearch, matrix_amax, resolve_global_scale, search_nvfp4
from qwantize_vllm.search.triton_tiles import LaunchShape

# A warp with 32 or 64 blocks, several such warps a program, and several tiles.
CANDIDATES = [
    LaunchShape(32 * warps * blocks, warps, tiles)
    for tiles in (1, 2, 4, 8)
    for blocks, warps in ((1, 1), (1, 2), (1, 4), (2, 1))
]
# Name, table, and what is searched and refined.
SEARCHES: list[tuple[str, dict[int, LaunchShape], ScaleSearch, Refine]] = [
    ("naive", triton_sse.NAIVE_SHAPES, "naive", "none"),
    ("optimal", triton_sse.OPTIMAL_SHAPES, "optimal", "none"),
    ("hessian", triton_hessian.HESSIAN_SHAPES, "hessian", "none"),
    ("codes", triton_codes.CODES_SHAPES, "hessian", "codes"),
]

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    n: Annotated[int, typer.Option(help="rows of the weight")] = 2560,
    k: Annotated[int, typer.Option(help="its columns")] = 9728,
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA GPU here; launch shapes are tuned on the GPU they are for")
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability()
    weight = random_weight((n, k), torch.bfloat16, device)
    scale = resolve_global_scale(matrix_amax(weight), "amax")
    table = Table(title=f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}), {n}x{k}, milliseconds")
    table.add_column("blocks, warps, tiles")
    times = []
    for name, shapes, search, refine in SEARCHES:
        table.add_column(name, justify="right")
        hessian = random_hessian(k, 16, device) if search == "hessian" else None
        run = functools.partial(search_nvfp4, weight, search, 16, scale, hessian, refine=refine)
        times.append([time_shape(shapes, major, shape, run, device) for shape in CANDIDATES])
    for i, shape in enumerate(CANDIDATES):
        table.add_row(", ".join(map(str, shape)), *(f"{1e3 * seconds[i]:.4f}" for seconds in times))
    Console().print(table)
    for (name, *_), seconds in zip(SEARCHES, times, strict=True):
        print(f"{name.upper()}_SHAPES: {major}: {CANDIDATES[seconds.index(min(seconds))]}")


def time_shape(
    shapes: dict[int, LaunchShape], major: int, shape: LaunchShape, run: Callable[[], Any], device: torch.device
) -> float:
    """Median seconds of a run with a launch shape in its table."""
    before = shapes.get(major)
    shapes[major] = shape
    try:
        return median_seconds(run, device)
    finally:
        if before is None:
            del shapes[major]
        else:
            shapes[major] = before


if __name__ == "__main__":
    app()
