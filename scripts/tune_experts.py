#!/usr/bin/env python3
"""Time the grouped kernels for the experts of a mixture in every shape on this GPU, and print the best.

    .venv/bin/python scripts/tune_experts.py [--model mixtral-8x7b] [--tokens 64]

RULES in qwantize_vllm/matmul/grouped_shapes.py maps the major version of the compute capability to the shapes of the
Triton kernel, one for the product with gate and up and one for that with down, by how many pairs of a token and an
expert an expert has on average. The table says which shapes the rules should lead to. Beside them is, on Hopper, the
kernel of gluon_grouped.py, in the shapes that choose_grouped_wgmma estimates to be the best ones and in those that are;
the last line says what WGMMA_PAIRS should be. Nothing is tuned while serving.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.cli.bench.graph_clock import copies_beyond_cache, mean_there_and_back, time_call
from qwantize_vllm.cli.bench.mixtures import MIXTURES, Inputs, random_experts, random_inputs, swizzled_experts
from qwantize_vllm.cli.bench.options import one_of
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.gpu import capability_major, multiprocessors
from qwantize_vllm.matmul.grouped_shapes import WGMMA_PAIRS, choose_grouped, choose_grouped_wgmma
from qwantize_vllm.matmul.tile_shapes import TileShape
from qwantize_vllm.matmul.wgmma_shapes import STEPS, WgmmaShape

TOKENS = [1, 4, 16, 64, 256, 1024, 4096]
# By the number of pairs in a tile: (groups, steps, warps, stages). Few, for a shape takes a second to compile and
# another one to be timed.
FORMS = {
    8: [(1, 4, 4, 3), (2, 4, 4, 3)],
    16: [(1, 4, 4, 3), (2, 2, 4, 3)],
    32: [(1, 4, 4, 3), (2, 2, 4, 4)],
    64: [(1, 2, 4, 3), (2, 1, 4, 4)],
    128: [(2, 1, 4, 3), (2, 1, 8, 4)],
}
# With fewer pairs an expert not even wgmma's smallest tiles, of 64, are filled to a quarter.
FEWEST_WGMMA_PAIRS = 16
Shapes = tuple[TileShape, TileShape]  # of both products
WgmmaShapes = tuple[WgmmaShape, WgmmaShape]
Weights = tuple[SwizzledExperts, SwizzledExperts]

app = typer.Typer(add_completion=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was timed with so many tokens.

    Attributes:
        pairs: of an expert, on average.
        rule: what grouped_shapes.py chooses.
        tiles: microseconds of the Triton kernel, by the shapes that fit this GPU.
        wgmma_rule: as rule.
        wgmma: microseconds of the kernel in Gluon; none where it does not run, or was not tried.
    """

    tokens: int
    pairs: float
    rule: Shapes
    tiles: dict[Shapes, float]
    wgmma_rule: WgmmaShapes
    wgmma: dict[WgmmaShapes, float]


@app.command(help=__doc__)
def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(MIXTURES)}; repeat it. Default: all but tiny.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="number of tokens; repeat it.")] = None,
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA GPU here; tile shapes are tuned on the GPU they are for")
    try:
        names = [one_of("--model", name, MIXTURES) for name in model or [name for name in MIXTURES if name != "tiny"]]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    major, minor = torch.cuda.get_device_capability()
    where = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    console, rows = Console(width=240), list[Row]()
    for name in names:
        of_model = list(measure(name, tokens or TOKENS, torch.device("cuda")))
        console.print(shape_table(of_model, f"{name} on {where}, microseconds"))
        rows += of_model
    console.print(wgmma_words(rows))


def measure(name: str, numbers: list[int], device: torch.device) -> Iterator[Row]:
    """A mixture's rows. On a CPU, which interprets Triton and times nothing of worth, for the tests."""
    mixture = MIXTURES[name]
    w13, w2 = random_experts(mixture, device)
    weights = [swizzled_experts(w13, w2) for _ in range(copies_beyond_cache(w13.nbytes + w2.nbytes, device))]
    for tokens in numbers:
        inputs, pairs = random_inputs(mixture, tokens, device), tokens * mixture.top_k
        tiles = tile_candidates(capability_major(device), pairs, mixture.experts)
        chosen = chosen_wgmma(pairs, weights[0], device)
        wgmma = wgmma_candidates(chosen, pairs / mixture.experts) if runs_wgmma(device) else []
        shapes: list[Shapes | WgmmaShapes] = [*tiles, *wgmma]
        timed = mean_there_and_back([functools.partial(time_experts, inputs, weights, shape) for shape in shapes])
        times = {shape: us for shape, us in zip(shapes, timed, strict=True) if us is not None}
        yield Row(
            tokens,
            pairs / mixture.experts,
            choose_grouped(capability_major(device), pairs, mixture.experts),
            {shape: times[shape] for shape in tiles if shape in times},
            chosen,
            {shape: times[shape] for shape in wgmma if shape in times},
        )


def tile_candidates(major: int | None, pairs: int, experts: int) -> list[Shapes]:
    """What the rules choose; that with another form of one product; and tiles of about as many pairs as an expert has,
    the same for both products."""
    each = pairs / experts
    first, second = choose_grouped(major, pairs, experts)
    others = [(TileShape(first.tokens, *form), second) for form in FORMS[first.tokens]]
    others += [(first, TileShape(second.tokens, *form)) for form in FORMS[second.tokens]]
    sizes = [size for size in FORMS if min(each, 64) <= size <= max(8, 4 * each)]
    same = [(shape, shape) for size in sizes for shape in (TileShape(size, *form) for form in FORMS[size])]
    return list(dict.fromkeys([(first, second), *others, *same]))


def chosen_wgmma(pairs: int, weights: Weights, device: torch.device) -> WgmmaShapes:
    first, second = (choose_grouped_wgmma(pairs, w.words.shape, multiprocessors(device)) for w in weights)
    return first, second


def wgmma_candidates(chosen: WgmmaShapes, each: float) -> list[WgmmaShapes]:
    """What is chosen, and all whose tiles an expert's pairs fill to a quarter. Tiles of both products have as many
    tokens."""
    if each < FEWEST_WGMMA_PAIRS:
        return []
    filled = [shape for shape in STEPS if shape.tokens <= 4 * each]
    both = [(first, second) for first in filled for second in filled if first.tokens == second.tokens]
    return list(dict.fromkeys([chosen, *both]))


def runs_wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and capability_major(device) == 9


def time_experts(inputs: list[Inputs], weights: list[Weights], shapes: Shapes | WgmmaShapes) -> float | None:
    """Microseconds of all experts of a layer; None where a shape does not fit this GPU."""
    from triton.runtime.errors import OutOfResources

    run = kernel_of(shapes)
    calls = [
        functools.partial(run, x, *weights[i % len(weights)], topk_weights, ids, "silu", shapes)
        for i, (x, topk_weights, ids) in enumerate(inputs)
    ]
    try:
        return 1e6 * time_call(calls, inputs[0][0].device).seconds
    except OutOfResources:
        return None


def kernel_of(shapes: Shapes | WgmmaShapes) -> Callable[..., torch.Tensor]:
    if isinstance(shapes[0], WgmmaShape):
        from qwantize_vllm.matmul.gluon_grouped import experts_wgmma

        return experts_wgmma
    from qwantize_vllm.matmul.triton_grouped import experts_swizzled

    return experts_swizzled


def shape_table(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for column in ("tokens", "pairs an expert", "by the rules", "best", "second", "third", "wgmma", "its best"):
        table.add_column(column)
    for row in rows:
        best, wgmma = best_first(row.tiles)[:3], best_first(row.wgmma)[:1]
        table.add_row(
            str(row.tokens),
            f"{row.pairs:.3g}",
            figure(row.tiles.get(row.rule)),
            *(best + [""] * (3 - len(best))),
            figure(row.wgmma.get(row.wgmma_rule)),
            *wgmma,
        )
    return table


def best_first(times: Mapping[Shapes, float] | Mapping[WgmmaShapes, float]) -> list[str]:
    return [
        f"{us:.1f} {' '.join(str(tuple(shape)) for shape in dict.fromkeys(shapes))}"
        for us, shapes in sorted((us, shapes) for shapes, us in times.items())
    ]


def figure(us: float | None) -> str:
    return "" if us is None else f"{us:.1f}"


def wgmma_words(rows: list[Row]) -> str:
    """From how many pairs an expert on, of those measured, wgmma as it is chosen takes less than the best of Triton."""
    timed = [row for row in rows if row.wgmma_rule in row.wgmma and row.tiles]
    slower = [row.pairs for row in timed if row.wgmma[row.wgmma_rule] >= min(row.tiles.values())]
    faster = [row.pairs for row in timed if row.pairs > max(slower, default=0)]
    found = f"from {min(faster):g} pairs an expert on" if faster else "nowhere"
    return f"WGMMA_PAIRS: wgmma is faster {found} (it is {WGMMA_PAIRS})"


if __name__ == "__main__":
    app()
