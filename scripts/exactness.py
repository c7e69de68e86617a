#!/usr/bin/env python3
"""Prove the scale search on millions of blocks: each against a float64 brute force over all 126 scales.

    .venv/bin/python scripts/exactness.py --checkpoint .cache/smollm2-135m-instruct --out exactness.json

On a GPU it tries the Triton kernels, elsewhere the PyTorch reference; on one core 10^6 blocks take seconds to a minute.
Exits with 1 where a block fails: its error exceeds the least one by more than the tolerance, its codes are not the
nearest, or the qwantize package (0.1.1) does better on it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
import typer
from exactness_peer import hessian_of, qwantize_peer
from exactness_verdict import Peer, Result, Tally, judge
from exactness_weights import KINDS, REAL, SYNTHETIC, Case, layer_cases, synthetic_cases
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from qwantize_vllm import quantize_nvfp4

Search = Literal["optimal", "hessian"]
GlobalScale = Literal["amax", "none"]
Backend = Literal["reference", "triton"]
BLOCK_SIZES: tuple[int, ...] = (16, 32)
T = TypeVar("T")

# Blocks judged at once: on a CPU their float64 copies stay in a core's cache, on a GPU they fill it.
_CHUNK_BLOCKS = {"cpu": 2048, "cuda": 2**18}
_PEER_BLOCKS_ON_CPU = 65536


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the table."""

    kind: str
    block_size: int
    global_scale: GlobalScale
    search: Search
    backend: Backend

    def __str__(self) -> str:
        return f"{self.kind}, {self.block_size}, {self.global_scale}, {self.search}, {self.backend}"


@dataclasses.dataclass(frozen=True)
class Options:
    """What all runs share. checkpoint and text are for the real layers, see `layer_cases`."""

    blocks: int
    device: str
    checkpoint: Path | None = None
    text: Path | None = None
    peer: Peer | None = None
    peer_blocks: int = 0

    def cases(self, run: Run) -> Iterator[Case]:
        with_hessian = run.search == "hessian"
        if run.kind != REAL:
            return synthetic_cases(run.kind, self.blocks, run.block_size, with_hessian, self.device)
        assert self.checkpoint is not None
        return layer_cases(self.checkpoint, self.blocks, run.block_size, with_hessian, self.device, self.text)


def try_search(run: Run, options: Options) -> Tally:
    """Quantize the blocks of a run and judge every one of them."""
    tally, chunk = Tally(), _CHUNK_BLOCKS[torch.device(options.device).type]
    with tqdm(total=options.blocks, desc=str(run), unit="block", unit_scale=True, disable=None, leave=False) as bar:
        for case in options.cases(run):
            hessian = None if case.activations is None else hessian_of(case.activations, run.block_size)
            q = quantize_nvfp4(case.weight, run.search, run.block_size, run.global_scale, hessian, backend=run.backend)
            naive = quantize_nvfp4(case.weight, "naive", run.block_size, run.global_scale, backend="reference")
            result = Result(case.weight, q, naive.block_scales, hessian, case.activations, case.hessian_kinds)
            judge(result, tally, chunk, options.peer, options.peer_blocks / options.blocks, bar.update)
    return tally


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command(help=__doc__)
def main(
    blocks: Annotated[int, typer.Option(help="at least so many in every row of the table")] = 1_000_000,
    kind: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(KINDS)}; repeatable; default all")] = None,
    block_size: Annotated[list[int] | None, typer.Option(help="16, 32; repeatable; default both")] = None,
    global_scale: Annotated[list[str] | None, typer.Option(help="amax, none; repeatable; default both")] = None,
    search: Annotated[list[str] | None, typer.Option(help="optimal, hessian; repeatable; default both")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="reference, triton; repeatable; default triton on a GPU, else reference")
    ] = None,
    device: Annotated[str, typer.Option(help="default cuda where there is one")] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="SmolLM2's; without it its layers are left out")] = None,
    text: Annotated[Path | None, typer.Option(help="measure the layers' Hessians on it, else synthetic ones")] = None,
    peer: Annotated[bool, typer.Option(help="compare with the qwantize package")] = True,
    peer_blocks: Annotated[int | None, typer.Option(help="of every row; default 65536 on a CPU, all on a GPU")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON, written anew after every row")] = None,
) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    backends = chosen("--backend", backend or ["triton" if on_gpu else "reference"], get_args(Backend))
    if "triton" in backends and not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which is later
    kinds = chosen("--kind", kind or ([*SYNTHETIC, REAL] if checkpoint else [*SYNTHETIC]), KINDS)
    if REAL in kinds and checkpoint is None:
        raise typer.BadParameter(f"--kind {REAL} needs --checkpoint")
    if peer_blocks is None:
        peer_blocks = blocks if on_gpu else min(blocks, _PEER_BLOCKS_ON_CPU)
    options = Options(blocks, device, checkpoint, text, qwantize_peer(device) if peer else None, peer_blocks)
    runs = itertools.product(
        chosen("--search", search, get_args(Search)),
        chosen("--global-scale", global_scale, get_args(GlobalScale)),
        chosen("--block-size", block_size, BLOCK_SIZES),
        kinds,
        backends,
    )
    rows = run_all([Run(k, b, g, s, e) for s, g, b, k, e in runs], options, out)
    console = Console()
    console.width = console.width if console.is_terminal else 180  # wide in a log file
    console.print(as_table(rows, options))
    if failed := sum(row["failures"] for row in rows):
        typer.echo(f"{failed} blocks failed", err=True)
        raise typer.Exit(1)


def chosen(option: str, given: list[T] | None, allowed: tuple[T, ...]) -> list[T]:
    """Those of the allowed values that were given, all if none was; typer has no lists of literals."""
    if unknown := set(given or []) - set(allowed):
        raise typer.BadParameter(f"{option} is one of {', '.join(map(str, allowed))}, not {unknown.pop()!r}")
    return [value for value in allowed if not given or value in given]


def run_all(runs: list[Run], options: Options, out: Path | None) -> list[dict[str, Any]]:
    """A dictionary for every run, and in the JSON file those that are ready."""
    rows: list[dict[str, Any]] = []
    name = torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else platform.processor()
    for run in runs:
        tally = try_search(run, options)
        rows.append({**dataclasses.asdict(run), **dataclasses.asdict(tally)})
        line = f"{run}: {tally.blocks:,} blocks, {tally.failures} failures, worst {tally.worst:.3g} of the tolerance"
        line += f", {tally.beyond_float32} beyond float32" if tally.failures else ""
        tqdm.write(line + (f"; qwantize better on {tally.peer_better}" if tally.peer_blocks else ""))
        if out is not None:
            machine = {"torch": torch.__version__, "device": f"{options.device} {name}".strip()}
            out.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    return rows


def as_table(rows: list[dict[str, Any]], options: Options) -> Table:
    title = f"float64 brute force over 126 scales, {options.device}"
    if options.peer is not None:
        title += f"; qwantize 0.1.1 on {options.peer_blocks:,} blocks of every row"
    table = Table(title=title)
    for column in ("weights", "block", "global", "search", "backend"):
        table.add_column(column)
    for column in ("blocks", "failures", "worst excess / tolerance", "naive optimal", "qwantize worse", "better"):
        table.add_column(column, justify="right")
    for row in rows:
        peer = ("–", "–")
        if row["peer_blocks"]:
            by_ties = f" (+{row['peer_better_by_ties']:,} by ties)" if row["peer_better_by_ties"] else ""
            peer = (f"{row['peer_worse']:,} of {row['peer_blocks']:,}", f"{row['peer_better']:,}{by_ties}")
        failures = f"{row['failures']:,}"
        if row["search"] == "hessian" and row["failures"]:
            failures += f" ({row['beyond_float32']:,} beyond float32)"
        table.add_row(
            *(str(row[key]) for key in ("kind", "block_size", "global_scale", "search", "backend")),
            f"{row['blocks']:,}",
            failures,
            f"{row['worst']:.2e}",
            f"{row['naive_optimal'] / row['blocks']:.1%}",
            *peer,
        )
    return table


if __name__ == "__main__":
    app()
