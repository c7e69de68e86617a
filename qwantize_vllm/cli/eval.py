"""`qwantize eval`: perplexity of a model under several settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.settings import read_settings_file, resolve_settings

SEARCHES = ("naive", "optimal")


def evaluate(
    model: Annotated[str, typer.Argument(help="Model name or directory, as `vllm serve` takes it.")],
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="UTF-8 text to score.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(help="bf16 (the model as it is), naive, optimal, or a YAML file of settings; repeat it."),
    ] = None,
    first_token: Annotated[int, typer.Option(help="Token at which the first window begins.")] = 0,
    window_tokens: Annotated[int, typer.Option(help="Tokens a window; each window is scored alone.")] = 1024,
    windows: Annotated[int, typer.Option(help="Number of windows.")] = 32,
    eager: Annotated[bool, typer.Option(help="Run without torch.compile and CUDA graphs.")] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the figures, window by window, as JSON.")] = None,
) -> None:
    """Perplexity through vLLM's own prompt log-probabilities, against the first setting named."""
    from qwantize_vllm.plugin.perplexity import Windows, measure, tokenize

    names = setting or ["bf16", *SEARCHES]
    try:
        chosen = {name: _settings(name) for name in names}
        cut = Windows(first_token, window_tokens, windows).cut(tokenize(model, text))
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    scores = {name: measure(model, cut, values, {"enforce_eager": eager}) for name, values in chosen.items()}
    base = scores[names[0]]
    table = Table(title=f"{model}: {windows} windows of {window_tokens} tokens from token {first_token} of {text.name}")
    for column in ("setting", "perplexity", f"log ratio to {names[0]}", "standard error"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for name, score in scores.items():
        mean, standard_error = score.log_ratio(base)
        table.add_row(name, f"{score.perplexity:.2f}", f"{mean:+.4f}", f"{standard_error:.4f}")
    Console().print(table)
    if out:
        out.write_text(json.dumps({name: _record(score, base) for name, score in scores.items()}, indent=1) + "\n")


def _settings(name: str) -> dict[str, Any] | None:
    """What a name stands for, checked before the first engine starts."""
    if name == "bf16":
        return None
    values = {"scale_search": name} if name in SEARCHES else read_settings_file(name)
    resolve_settings({name: values})
    return values


def _record(score: Any, base: Any) -> dict[str, Any]:
    mean, error = score.log_ratio(base)
    return {
        "perplexity": score.perplexity,
        "log_ratio": mean,
        "log_ratio_standard_error": error,
        "window_nll": score.window_nll,
    }
