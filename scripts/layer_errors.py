#!/usr/bin/env python3
"""What each search does to the outputs of a model's linear layers, from their full Hessians; no engine runs.

    qwantize calibrate MODEL --text TEXT --full --out full.safetensors
    .venv/bin/python scripts/layer_errors.py MODEL full.safetensors [--judged-by other.safetensors] [--out errors.json]

With H the sum of x x' over a layer's inputs, W the weight and R = W - Q what its quantization leaves of it,

    output error   sqrt(tr(R H R') / tr(W H W')),  which is |X W' - X Q'| / |X W'|
    block error    the same with the blocks on H's diagonal only: what `scale_search: hessian` minimizes
    weight error   |R| / |W|

"all" adds up the numerators and the denominators of all layers, "mean" is the mean of the layers' ratios. --judged-by
takes the H of the errors from another file, of another text, while the searches have that of the first.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from tqdm import tqdm

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4
from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.search.gptq import diagonal_blocks

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SEARCHES: dict[str, dict[str, Any]] = {
    "naive": {"scale_search": "naive"},
    "optimal": {"scale_search": "optimal"},
    "hessian": {"scale_search": "hessian"},
    "hessian+codes": {"scale_search": "hessian", "refine": "codes"},
    "hessian+gptq": {"scale_search": "hessian", "refine": "gptq"},
}
KINDS = ("output", "block", "weight")

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Argument(help="Directory of the checkpoint, safetensors.")],
    hessians: Annotated[Path, typer.Argument(help="File of full Hessians.")],
    judged_by: Annotated[Path | None, typer.Option(help="Another such file, for the errors.")] = None,
    block_size: Annotated[int, typer.Option(help="16 or 32.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write every layer's figures, as JSON.")] = None,
) -> None:
    file = HessianFile(hessians, block_size)
    judge = file if judged_by is None else HessianFile(judged_by, block_size)
    layers: dict[str, dict[str, Any]] = {}
    for name in tqdm(sorted(file.names), unit="layer", disable=None):
        weight = read_weight(model, name).to(device)
        own, other = (each.read_full(name).to(device) for each in (file, judge))
        layers[name] = {
            search: energies(weight, quantize(weight, own, block_size, **how), other)
            for search, how in SEARCHES.items()
        }
    Console().print(
        table(layers, f"{model.name}, {len(layers)} layers, H of {hessians.name}, errors by {judge.path.name}")
    )
    if out:
        out.write_text(json.dumps(layers, indent=1) + "\n")


def read_weight(model: Path, layer: str) -> torch.Tensor:
    """The weight (N, K) of one of vLLM's layers, whose members are stacked."""
    parent, _, last = layer.rpartition(".")
    names = [f"{parent}.{member}.weight" for member in FUSED.get(last, (last,))]
    parts: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            parts |= {name: file.get_tensor(name) for name in set(names) & set(file.keys())}
    if missing := [name for name in names if name not in parts]:
        raise typer.BadParameter(f"{model} has no {', '.join(missing)}, for the layer {layer} of the Hessian file")
    return torch.cat([parts[name] for name in names])


def quantize(weight: torch.Tensor, hessian: torch.Tensor, block_size: int, **how: Any) -> Nvfp4Tensor:
    if how["scale_search"] == "hessian":
        how["hessian"] = hessian if how.get("refine") == "gptq" else diagonal_blocks(hessian, block_size)
    return quantize_nvfp4(weight, block_size=block_size, **how)


def energies(weight: torch.Tensor, q: Nvfp4Tensor, hessian: torch.Tensor) -> dict[str, tuple[float, float]]:
    """By kind of error: (of the residual, of the weight), before the root."""
    h, blocks = hessian.double(), diagonal_blocks(hessian.double(), q.block_size)
    both = (weight.double() - q.dequantize().double(), weight.double())
    columns = [each.unflatten(1, (len(blocks), -1)).transpose(0, 1) for each in both]
    output, weights = [float(((r @ h) * r).sum()) for r in both], [float(r.square().sum()) for r in both]
    block = [float(((r @ blocks) * r).sum()) for r in columns]
    return {kind: (pair[0], pair[1]) for kind, pair in zip(KINDS, (output, block, weights), strict=True)}


def table(layers: dict[str, dict[str, Any]], title: str) -> Table:
    result = Table(title=f"{title}, percent")
    result.add_column("search")
    for kind in KINDS:
        result.add_column(f"{kind}, all", justify="right")
        result.add_column("mean", justify="right")
    for search in SEARCHES:
        figures = []
        for kind in KINDS:
            pairs = [layer[search][kind] for layer in layers.values()]
            figures.append(math.sqrt(sum(r for r, _ in pairs) / sum(w for _, w in pairs)))
            figures.append(sum(math.sqrt(r / w) for r, w in pairs) / len(pairs))
        result.add_row(search, *(f"{100 * figure:.3f}" for figure in figures))
    return result


if __name__ == "__main__":
    app()
