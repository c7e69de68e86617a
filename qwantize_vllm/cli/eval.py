"""`qwantize eval`: perplexity and KL divergence of a model under several settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.cli.bench.output import draw, make_table
from qwantize_vllm.cli.eval_plot import plot
from qwantize_vllm.cli.setting_names import SEARCHES, settings_named, short_names
from qwantize_vllm.cli.unquantized import check_unquantized

_BASE = "bf16"


def evaluate(
    model: Annotated[str, typer.Argument(help="Model name or directory, as `vllm serve` takes it.")],
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="UTF-8 text to score.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(help="naive, optimal, or a YAML file of settings; repeat it. bf16 (as it is) always comes first."),
    ] = None,
    first_token: Annotated[int, typer.Option(help="Token at which the first window begins.")] = 0,
    window_tokens: Annotated[int, typer.Option(help="Tokens a window; each window is scored alone.")] = 1024,
    windows: Annotated[int, typer.Option(help="Number of windows; 0: as many as the text has.")] = 32,
    kl: Annotated[bool, typer.Option(help="Measure KL divergences from bf16 too.")] = True,
    eager: Annotated[bool, typer.Option(help="Run without torch.compile and CUDA graphs.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Also write the figures, window by window, as JSON, and a plot beside it.")
    ] = None,
) -> None:
    """Perplexity by vLLM's own prompt log-probabilities, and KL divergence of its next-token distributions from bf16.

    Log ratio: of the perplexity to bf16's. KL: over the whole vocabulary, mean over tokens, nats. Same top: how often
    the most likely token is bf16's. Errors are standard errors of means over windows, each compared with bf16's.
    """
    from qwantize_vllm.plugin.perplexity import Windows, measure, tokenize

    try:
        chosen = {_BASE: None} | {name: settings_named(name) for name in setting or SEARCHES if name != _BASE}
        check_unquantized(model)
        if text.suffix == ".jsonl":
            raise ValueError(f"--text {text} would be scored as the JSON that it is; give plain text")
        if out:
            if out.suffix == ".png" or out.is_dir():
                raise ValueError(f"--out {out} is to be the JSON file; the plot is written beside it, as .png")
            out.parent.mkdir(parents=True, exist_ok=True)
        cut = Windows(first_token, window_tokens, windows).cut(tokenize(model, text))
        scores = measure(model, cut, chosen, {"enforce_eager": eager}, kl)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    records = {name: _record(score, scores[_BASE]) for name, score in scores.items()}
    title = f"{model}: {len(cut)} windows of {window_tokens} tokens from token {first_token} of {text.name}"
    console = Console(markup=False)
    console.print(_table(title, records))
    if out:
        _write(out, title, records, console)


def _record(score: Any, base: Any) -> dict[str, Any]:
    """The figures of one setting, as JSON has them; those of bf16 against itself are None."""
    against_base = score is not base
    mean, error = score.log_ratio(base) if against_base else (None, None)
    kl, kl_error = score.kl or (None, None)
    agreement, agreement_error = score.agreement or (None, None)
    return {
        "perplexity": score.perplexity,
        "log_ratio": mean,
        "log_ratio_standard_error": error,
        "kl": kl,
        "kl_standard_error": kl_error,
        "same_top_token": agreement,
        "same_top_token_standard_error": agreement_error,
        "window_nll": score.window_nll,
        "window_kl": score.window_kl,
        "window_same_top_token": score.window_agreement,
    }


def _table(title: str, records: dict[str, dict[str, Any]]) -> Table:
    columns = {
        "perplexity": ("perplexity", "{:.2f}"),
        "log ratio": ("log_ratio", "{:+.4f}"),
        "error": ("log_ratio_standard_error", "{:.4f}"),
        "KL": ("kl", "{:.4f}"),
        "error ": ("kl_standard_error", "{:.4f}"),
        "same top": ("same_top_token", "{:.1%}"),
    }
    table = make_table(["setting"], columns, f"{title}, against bf16")
    labels = short_names(records)
    for name, record in records.items():
        figures = [form.format(record[key]) if record[key] is not None else "" for key, form in columns.values()]
        table.add_row(labels[name], *figures)
    return table


def _write(out: Path, title: str, records: dict[str, dict[str, Any]], console: Console) -> None:
    out.write_text(json.dumps(_finite(records), indent=1, allow_nan=False) + "\n")
    draw(out.with_suffix(".png"), lambda path: plot(path, records, title), out, console)


def _finite(value: Any) -> Any:
    """As JSON has it, which knows neither NaN nor infinities."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
