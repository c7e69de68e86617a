"""`qwantize bench serve`: how fast vLLM serves a quantized model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_METHODS = {"bf16": None, "qwantize": "qwantize"}


def bench_serve(
    shape: Annotated[
        str, typer.Option(help="Shape of the model, its weights random: llama-3-8b, qwen3-30b-a3b or tiny.")
    ] = "llama-3-8b",
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each request.")] = 256,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt of the prefill measurement.")] = 4096,
    eager: Annotated[bool, typer.Option(help="Run without torch.compile and CUDA graphs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Tokens a second at batch 1 and 32, and seconds of one prefill: qwantize against bf16 in vLLM."""
    from qwantize_vllm.plugin.throughput import SHAPES, Load, measure

    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape must be one of {list(SHAPES)}, got {shape!r}")
    loads = [Load(1, 16, new_tokens), Load(32, 16, new_tokens), Load(1, prefill_tokens, 1)]
    engine = {"max_model_len": max(16 + new_tokens, prefill_tokens + 1), "enforce_eager": eager}
    with tempfile.TemporaryDirectory() as directory:
        seconds = {name: measure(shape, Path(directory), method, loads, engine) for name, method in _METHODS.items()}
    table = Table(title=f"{shape}, random weights, median of three runs")
    for column in ("", *seconds):
        table.add_column(column, justify="right")
    for i, load in enumerate(loads):
        tokens = load.requests * load.new_tokens
        decode = load.new_tokens > 1
        label = f"tokens/s, batch {load.requests}" if decode else f"ms, prefill of {load.prompt_tokens} tokens"
        figures = [tokens / each[i] if decode else 1000 * each[i] for each in seconds.values()]
        table.add_row(label, *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    if out:
        out.write_text(json.dumps({"shape": shape, "loads": [vars(load) for load in loads], "seconds": seconds}) + "\n")
