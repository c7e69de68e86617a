#!/usr/bin/env python3
"""Time the fused kernel for CPUs against strips on this CPU, and print up to how many tokens it is not slower.

    .venv/bin/python scripts/tune_cpu.py [--shape 4096x4096] [--tokens 64] [--dtype bfloat16]

_CPU_FUSED_TOKENS and _CPU_FUSED_TOKENS_ELSEWHERE in qwantize_vllm/matmul/backends.py are such numbers; which of them is
for x of which dtype, `cpu_fused_tokens` there says by what the CPU has. OMP_NUM_THREADS says on how many cores it runs.
All is timed there and back, and the shorter time counts: other programs on the same cores only add to it. Where there
are some, believe what several runs say. Nothing is tuned while serving.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.cli.bench.clock import median_seconds
from qwantize_vllm.cli.bench.graph_clock import there_and_back
from qwantize_vllm.cli.bench.inputs import random_activations, random_weight
from qwantize_vllm.cli.bench.machine import device_name
from qwantize_vllm.cli.bench.options import dtype_option, one_of, shape_option
from qwantize_vllm.cli.bench.shapes import Layer, choose_layers
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.backends import BACKENDS, cpu_fused_tokens
from qwantize_vllm.matmul.cpu_fused import why_not_fused
from qwantize_vllm.search.quantize import quantize_nvfp4

CPU = torch.device("cpu")
BLOCK_SIZE = 16
# Of a small model, and of Llama 3 8B.
SHAPES = ["576x1536", "4096x4096"]
TOKENS = [1, 8, 16, 32, 48, 64, 96, 128, 256]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What the limits go by, in LLVM's words.
FEATURES = ("avx512f", "avx512bf16", "avx512fp16", "amx-bf16")

app = typer.Typer(add_completion=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """Microseconds of the product with so many tokens."""

    tokens: int
    fused: float
    strips: float


@app.command(help=__doc__)
def main(
    shape: Annotated[list[str] | None, shape_option("NxK")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="number of tokens; repeat it.")] = None,
    dtype: Annotated[list[str] | None, dtype_option("the activations", DTYPES)] = None,
) -> None:
    if reason := why_not_fused():
        raise typer.BadParameter(f"the fused kernel cannot be compiled here: {reason}")
    try:
        layers = choose_layers([], shape or SHAPES, BLOCK_SIZE, experts=False)
        names = [one_of("--dtype", name, DTYPES) for name in dtype or DTYPES]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(width=120)
    console.print(f"{device_name(CPU)}: {features()}")
    for layer, name in itertools.product(layers, names):
        rows = measure(layer, DTYPES[name], sorted(set(tokens or TOKENS)))
        console.print(time_table(rows, f"{layer}, {name}, microseconds"))
        console.print(f"the fused kernel is not slower up to {fused_up_to(rows)} tokens; {auto_words(DTYPES[name])}\n")


def auto_words(dtype: torch.dtype) -> str:
    limit = cpu_fused_tokens(dtype)
    return "auto always takes it" if math.isinf(limit) else f"auto takes it up to {limit}"


def features() -> str:
    """What this CPU has of FEATURES."""
    from qwantize_vllm.matmul.llvm_run import has

    return ", ".join(feature if has(feature) else f"no {feature}" for feature in FEATURES)


def measure(layer: Layer, dtype: torch.dtype, numbers: list[int]) -> list[Row]:
    n, k = layer.shape
    q = quantize_nvfp4(random_weight((n, k), torch.bfloat16, CPU), "naive", BLOCK_SIZE)
    inputs = [random_activations(tokens, k, dtype, CPU) for tokens in numbers]
    both = itertools.product(inputs, ("cpu_fused", "cpu"))
    times = [min(twice) for twice in there_and_back([functools.partial(time_backend, x, q, name) for x, name in both])]
    return [Row(*row) for row in zip(numbers, times[::2], times[1::2], strict=True)]


def time_backend(x: torch.Tensor, q: Nvfp4Tensor, backend: str) -> float:
    """Microseconds of a product; what a kernel takes to compile is not counted."""
    return 1e6 * median_seconds(functools.partial(BACKENDS[backend].run, x, q, None), CPU)


def time_table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "fused", "strips", "strips / fused"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row.tokens), f"{row.fused:.0f}", f"{row.strips:.0f}", f"{row.strips / row.fused:.2f}")
    return table


def fused_up_to(rows: list[Row]) -> int:
    """The largest number of tokens, of those measured, up to which the fused kernel never takes longer; 0: none."""
    faster = itertools.takewhile(lambda row: row.fused <= row.strips, rows)
    return max((row.tokens for row in faster), default=0)


if __name__ == "__main__":
    app()
