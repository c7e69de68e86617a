#!/usr/bin/env python3
"""Time the kernels for swizzled weights in every shape on this GPU, and print the best, and what estimates need.

    .venv/bin/python scripts/tune_matmul.py [--block-size 32]

RULES in qwantize_vllm/matmul/tile_shapes.py maps the major version of the compute capability to shapes of the Triton
kernel, to those of the kernel for few tokens ("decode"), or to that for wgmma. The first table says which ones the
rules should lead to; "dequantized" is what serves where no rule fits, "bf16" a dense layer. The second one has the
constants of qwantize_vllm/matmul/wgmma_shapes.py, the third one times norm, product and gate in one kernel (_NORMED).
Nothing is tuned while serving.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.cli.bench.graph_clock import copies_beyond_cache, mean_there_and_back, time_call
from qwantize_vllm.cli.bench.inputs import random_activations, random_weight
from qwantize_vllm.cli.bench.options import BlockSize
from qwantize_vllm.matmul.backends import run_swizzled
from qwantize_vllm.matmul.normed import AddedNorm, gate_alone, norm_alone
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4, swizzle
from qwantize_vllm.matmul.tile_shapes import NORMED_TOKENS, DecodeShape, TileShape, choose_normed_shape
from qwantize_vllm.matmul.wgmma_shapes import STEPS, WgmmaShape
from qwantize_vllm.search.quantize import quantize_nvfp4

# Of Llama 3 8B, and the largest one of 70B.
LAYERS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "gate_up_70b": (57344, 8192),
}
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
# (groups, steps, warps, stages)
FORMS = [(1, 4, 2, 3), (1, 4, 4, 3), (1, 2, 4, 3), (1, 2, 4, 4), (1, 1, 4, 3), (2, 2, 4, 3), (2, 1, 4, 4), (2, 2, 8, 3)]
# Of these a norm stands before the product, in Llama; and whether a gate stands behind it.
NORMED_LAYERS = {"qkv": False, "gate_up": True}
# (parts, tiles, warps)
DECODE_FORMS = [(1, 4, 8), (1, 4, 16), (1, 2, 8), (1, 2, 16), (2, 2, 4), (2, 4, 2), (2, 4, 4), (2, 4, 8), (4, 2, 4)]
KINDS = {TileShape: "", DecodeShape: "decode ", WgmmaShape: "wgmma "}
Candidate = TileShape | DecodeShape | WgmmaShape

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    layer: Annotated[list[str] | None, typer.Option(help=f"{', '.join(LAYERS)}; repeat it. Default: all.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="number of tokens; repeat it.")] = None,
    block_size: BlockSize = 16,
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA GPU here; tile shapes are tuned on the GPU they are for")
    console = Console(width=200)
    console.print(tile_table(layer or list(LAYERS), tokens or TOKENS, block_size))
    if torch.cuda.get_device_capability()[0] == 9:
        console.print(wgmma_table(block_size))
        console.print(normed_table(block_size))


def tile_table(layers: list[str], tokens: list[int], block_size: int) -> Table:
    major, minor = torch.cuda.get_device_capability()
    table = Table(title=f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}), microseconds")
    for column in ("layer", "tokens", "bf16", "by the rules", "dequantized", "best", "second", "third"):
        table.add_column(column)
    for name in layers:
        weights, dense = swizzled_copies(LAYERS[name], block_size), dense_copies(LAYERS[name])
        for m in tokens:
            x = random_activations(m, LAYERS[name][1], torch.bfloat16, torch.device("cuda"))
            shapes = candidates(m, block_size)
            products = [functools.partial(torch.nn.functional.linear, x, w) for w in dense]
            timed = mean_there_and_back(
                [
                    functools.partial(time_calls, products),
                    *(functools.partial(time_backend, x, weights, backend) for backend in ("auto", "unswizzled")),
                    *(functools.partial(time_shape, x, weights, shape) for shape in shapes),
                ]
            )
            best = sorted((us, shape) for us, shape in zip(timed[3:], shapes, strict=True) if us is not None)[:3]
            words = [f"{us:.1f} {KINDS[type(shape)]}{tuple(shape)}" for us, shape in best]
            table.add_row(name, str(m), *(f"{us:.1f}" for us in timed[:3]), *words)
    return table


def wgmma_table(block_size: int) -> Table:
    """From the times of one round of all multiprocessors, a longer one, two, half a round and a quarter."""
    table = Table(title="wgmma_shapes.py: microseconds for 64 columns; for 64 rows and one token")
    for column in ("shape", "STEPS", "_STORE", "_EXCHANGE of two slices", "of four"):
        table.add_column(column)
    for shape in STEPS:
        size = shape.tokens * shape.groups
        time = functools.partial(time_wgmma, shape, block_size)
        once, longer = time(4, 4096), time(4, 12288)
        step = (longer - once) / 128
        store = (time(8, 4096) - once - 64 * step) / size
        start = once - 64 * step - size * store
        half = (time(2, 4096) - start - 32 * step) / size
        quarter = (time(1, 4096) - start - 16 * step) / size
        exchange = (half - store) * 2, (quarter - store) * 4 / 3
        table.add_row(str(tuple(shape)), f"{step:.3f}", f"{store:.4f}", *(f"{each:.4f}" for each in exchange))
    return table


def time_wgmma(shape: WgmmaShape, block_size: int, quarters: int, k: int) -> float:
    """Microseconds of a product whose tiles fill so many quarters of the multiprocessors."""
    row_tiles = torch.cuda.get_device_properties().multi_processor_count // 4
    weights = swizzled_copies((64 * shape.groups * row_tiles, k), block_size)
    x = random_activations(quarters * shape.tokens, k, torch.bfloat16, torch.device("cuda"))
    calls = [functools.partial(kernel_of(shape), x, weight, None, shape) for weight in weights]
    return time_calls(calls)


def normed_table(block_size: int) -> Table:
    table = Table(title="norm, product and, of gate_up, gate: microseconds")
    for column in ("layer", "tokens", "one after the other", "by the rules", "best", "second", "third"):
        table.add_column(column)
    for (name, gated), m in itertools.product(NORMED_LAYERS.items(), NORMED_TOKENS):
        weights = swizzled_copies(LAYERS[name], block_size)
        x = random_activations(m, LAYERS[name][1], torch.bfloat16, torch.device("cuda"))
        shapes = [shape for shape in decode_shapes(m, block_size) if not gated or shape.parts > 1]
        by_the_rules = choose_normed_shape(9, m, gated, block_size)
        timed = mean_there_and_back(
            [functools.partial(time_normed, x, weights, gated, shape) for shape in (None, by_the_rules, *shapes)]
        )
        best = sorted(zip(timed[2:], shapes, strict=True))[:3]
        words = [f"{us:.2f} {tuple(shape)}" for us, shape in best]
        table.add_row(name, str(m), *(f"{us:.2f}" for us in timed[:2]), *words)
    return table


def time_normed(x: torch.Tensor, weights: list[SwizzledNvfp4], gated: bool, shape: DecodeShape | None) -> float:
    """Microseconds of a norm, a product and perhaps a gate: in one kernel of that shape, or one after the other."""
    from qwantize_vllm.matmul.gluon_decode import matmul_decode

    norm = AddedNorm(x.flip(0), torch.ones_like(x[0]), 1e-5, torch.empty_like(x))

    def multiply(weight: SwizzledNvfp4) -> torch.Tensor:
        if shape is not None:
            return matmul_decode(x, weight, None, shape, norm=norm, gated=gated)
        y = run_swizzled(norm_alone(x, norm), weight, None)
        return gate_alone(y) if gated else y

    return time_calls([functools.partial(multiply, weight) for weight in weights])


def swizzled_copies(shape: tuple[int, int], block_size: int) -> list[SwizzledNvfp4]:
    """Copies of one weight that together exceed the L2 cache."""
    device = torch.device("cuda")
    q = quantize_nvfp4(random_weight(shape, torch.bfloat16, device), "naive", block_size)
    weight = swizzle(q)
    return [
        dataclasses.replace(weight, words=weight.words.clone(), scales=weight.scales.clone())
        for _ in range(copies_beyond_cache(q.nbytes, device))
    ]


def dense_copies(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Copies of a bf16 weight that together exceed the L2 cache."""
    device = torch.device("cuda")
    weight = random_weight(shape, torch.bfloat16, device)
    return [weight.clone() for _ in range(copies_beyond_cache(weight.nbytes, device))]


def decode_shapes(tokens: int, block_size: int) -> list[DecodeShape]:
    """Of the kernel for few tokens, those that can read the scales of such blocks."""
    shapes = (DecodeShape(tokens, *form) for form in DECODE_FORMS)
    return [shape for shape in shapes if shape.takes(block_size)]


def candidates(m: int, block_size: int) -> list[Candidate]:
    """Tiles that hold m tokens, and smaller ones from 64 tokens on."""
    sizes = [size for size in (8, 16, 32, 64, 128, 256) if size < 2 * max(m, 8) and (size >= m or size >= 64)]
    few = [size for size in (1, 2, 4) if m <= size < 2 * m]
    return [
        *(shape for size in few for shape in decode_shapes(size, block_size)),
        *(TileShape(size, *form) for size in sizes for form in FORMS),
        *(shape for shape in STEPS if m > 32 and shape.tokens < 2 * m),
    ]


def time_shape(x: torch.Tensor, weights: list[SwizzledNvfp4], shape: Candidate) -> float | None:
    """Microseconds of a product; None where the shape does not fit this GPU."""
    from triton.runtime.errors import OutOfResources

    if not isinstance(shape, TileShape) and torch.cuda.get_device_capability()[0] != 9:
        return None
    multiply = kernel_of(shape)
    try:
        return time_calls([functools.partial(multiply, x, weight, None, shape) for weight in weights])
    except OutOfResources:
        return None


def kernel_of(shape: Candidate) -> Callable[..., torch.Tensor]:
    from qwantize_vllm.matmul.gluon_decode import matmul_decode
    from qwantize_vllm.matmul.gluon_wgmma import matmul_wgmma
    from qwantize_vllm.matmul.triton_swizzled import matmul_swizzled

    kernels: dict[type, Callable[..., torch.Tensor]] = {
        TileShape: matmul_swizzled,
        DecodeShape: matmul_decode,
        WgmmaShape: matmul_wgmma,
    }
    return kernels[type(shape)]


def time_backend(x: torch.Tensor, weights: list[SwizzledNvfp4], backend: str) -> float:
    calls = [functools.partial(run_swizzled, x, weight, None, backend) for weight in weights]
    return time_calls(calls)


def time_calls(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a call with one copy of the weight."""
    return 1e6 * time_call(calls, torch.device("cuda")).seconds


if __name__ == "__main__":
    app()
