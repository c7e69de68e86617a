"""`qwantize bench serve`: how fast vLLM serves a quantized model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.settings import resolve_settings

if TYPE_CHECKING:
    from qwantize_vllm.plugin.throughput import Load


def bench_serve(
    shape: Annotated[
        str,
        typer.Option(help="Shape of the model, random weights: llama-3-8b, qwen3-30b-a3b, smollm2-135m or tiny."),
    ] = "llama-3-8b",
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Fewer layers than the shape has: where bf16 needs more memory than is there."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Also with this value of the setting backend, such as marlin or humming; repeat it."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each request.")] = 256,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt of the prefill measurement.")] = 4096,
    eager: Annotated[bool, typer.Option(help="Run without torch.compile and CUDA graphs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Tokens a second at batch 1 and 32, and seconds of one prefill: qwantize against bf16 in vLLM."""
    from qwantize_vllm.plugin.throughput import SHAPES, Load, measure

    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape must be one of {list(SHAPES)}, got {shape!r}")
    methods = _methods(backend or [])
    config = SHAPES[shape] if layers is None else SHAPES[shape] | {"num_hidden_layers": layers}
    loads = [Load(1, 16, new_tokens), Load(32, 16, new_tokens), Load(1, prefill_tokens, 1)]
    engine = {"max_model_len": max(16 + new_tokens, prefill_tokens + 1), "enforce_eager": eager}
    seconds: dict[str, list[float]] = {}
    console = Console()
    for name, method in methods.items():
        with tempfile.TemporaryDirectory() as directory:
            try:
                seconds[name] = measure(config, Path(directory), loads, engine | method)
            except Exception as error:  # of any engine; the other methods' figures are worth having
                console.print(f"{name} failed: {type(error).__name__}: {error}", markup=False)
                continue
        figures = (f"{label} {figure:.1f}" for label, figure in map(_figure, loads, seconds[name]))
        console.print(f"{name}: {'; '.join(figures)}", soft_wrap=True)
    title = f"{shape}, {config['num_hidden_layers']} layers, random weights, median of three runs"
    console.print(_table(title, loads, seconds))
    if out:
        record = {"shape": shape, "layers": config["num_hidden_layers"], "seconds": seconds}
        out.write_text(json.dumps(record | {"loads": [vars(load) for load in loads]}) + "\n")
    if len(seconds) < len(methods):
        raise typer.Exit(1)


def _methods(backends: list[str]) -> dict[str, dict[str, Any]]:
    """Arguments of `vllm.LLM`, by the name that their figures have."""
    methods: dict[str, dict[str, Any]] = {"bf16": {}, "qwantize": {"quantization": "qwantize"}}
    for backend in backends:
        try:
            resolve_settings({"--backend": {"backend": backend}})
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        given = {"additional_config": {"qwantize": {"backend": backend}}}
        methods[f"qwantize, {backend}"] = {"quantization": "qwantize"} | given
    return methods


def _table(title: str, loads: list[Load], seconds: dict[str, list[float]]) -> Table:
    table = Table(title=title)
    for column in ("", *seconds):
        table.add_column(column, justify="right")
    for i, load in enumerate(loads):
        figures = [_figure(load, each[i]) for each in seconds.values()]
        table.add_row(*dict.fromkeys(label for label, _ in figures), *(f"{figure:.1f}" for _, figure in figures))
    return table


def _figure(load: Load, seconds: float) -> tuple[str, float]:
    """What a load is judged by, and how it did."""
    if load.new_tokens > 1:
        return f"tokens/s, batch {load.requests}", load.requests * load.new_tokens / seconds
    return f"ms, prefill of {load.prompt_tokens} tokens", 1000 * seconds
