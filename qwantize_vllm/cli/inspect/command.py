"""`qwantize inspect`: the command and its tables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm import __version__
from qwantize_vllm.cli.bench.options import make_directory
from qwantize_vllm.cli.bench.output import make_table
from qwantize_vllm.cli.inspect import page, summary
from qwantize_vllm.cli.inspect.files import check_files
from qwantize_vllm.cli.setting_names import SEARCHES, settings_named
from qwantize_vllm.cli.unquantized import check_unquantized
from qwantize_vllm.hessian import HessianFile

if TYPE_CHECKING:  # imports vLLM
    from qwantize_vllm.plugin.inspection import Inspection


def inspect(
    model: Annotated[str, typer.Argument(help="Model name or directory, as `vllm serve` takes it.")],
    hessian: Annotated[
        Path | None,
        typer.Option(help="Block Hessians, by `qwantize calibrate`: measure output errors with them, and search too."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="naive, optimal, hessian (with --hessian), or a YAML file of settings; repeat it. Default: all three."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="As `vllm serve --dtype`.")] = "auto",
    show: Annotated[int, typer.Option(min=0, help="Layers in the printed table, the worst ones.")] = 20,
    out: Annotated[Path, typer.Option(help="Directory for inspect.json and inspect.html.")] = Path("inspect-results"),
) -> None:
    """What quantizing does to every layer: weight error, output error, signal-to-noise ratio, memory.

    Reads the checkpoint layer by layer, as vLLM would fuse and quantize it, without starting an engine.
    """
    console = Console(markup=False)
    try:
        settings = _settings(setting or [*SEARCHES, *(["hessian"] if hessian else [])], hessian)
        check_files(model)
        check_unquantized(model)
        make_directory(out)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # what vLLM says of engines would bury the table
        from qwantize_vllm.plugin.inspection import inspect_model

        inspection = inspect_model(model, settings, hessian, dtype)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    _print(inspection, show, console)
    record = summary.to_json(inspection, __version__)
    (out / "inspect.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")
    (out / "inspect.html").write_text(page.render(inspection, __version__), "utf-8")
    console.print(f"wrote {out / 'inspect.json'} and {out / 'inspect.html'}")


def _settings(names: list[str], hessian: Path | None) -> dict[str, dict[str, Any]]:
    """Of the plugin, by name.

    Raises:
        ValueError, FileNotFoundError: a setting or the Hessian file cannot be used.
    """
    found = {}
    for name in names:
        if name != "hessian":
            found[name] = settings_named(name)
        elif hessian is None:
            raise ValueError("--setting hessian needs --hessian, a file written by `qwantize calibrate`")
        else:
            size = HessianFile(hessian).info.block_size
            found[name] = {"scale_search": "hessian", "hessian": str(hessian), "block_size": size}
    if hessian is not None:
        HessianFile(hessian)  # what cannot be read is refused before vLLM is imported
    return found


def _print(inspection: Inspection, show: int, console: Console) -> None:
    setting, metric = summary.ranking(inspection)
    if show:
        console.print(_layer_table(inspection, show, f"worst layers by {_words(metric)} under {setting}; dB too"))
    console.print(_total_table(inspection))
    for name, patterns in inspection.unused.items():
        for pattern in patterns:
            console.print(f"{name}: the ignore pattern {pattern!r} names no layer of this model")
    parts = [
        f"{count} {reason} ({summary.size(nbytes)})"
        for reason, (count, nbytes) in summary.left_by_reason(inspection).items()
    ]
    console.print(f"not quantized under any setting: {', '.join(parts) or 'nothing'}")


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _layer_table(inspection: Inspection, show: int, title: str) -> Table:
    setting, metric = summary.ranking(inspection)
    table = make_table(["layer"], ["N x K", *(f"{name} %" for name in inspection.settings), "dB"], title)
    for layer in summary.worst_first(inspection)[:show]:
        errors = [summary.error_of(layer, name, metric) for name in inspection.settings]
        figures = [
            "left" if isinstance(result, str) else "" if error is None else f"{100 * error:.2f}"
            for result, error in zip(layer.results.values(), errors, strict=True)
        ]
        result = layer.results[setting]
        ratio = "" if isinstance(result, str) else f"{result.snr_db:.2f}"
        table.add_row(layer.name, "x".join(map(str, layer.shape)), *figures, ratio)
    return table


def _total_table(inspection: Inspection) -> Table:
    _, metric = summary.ranking(inspection)
    has_output = metric == summary.OUTPUT
    columns = ["layers", "left", *(["output error %", "of all"] if has_output else []), "weight error %", "of all "]
    dense = summary.size(summary.dense_bytes(inspection))
    table = make_table(
        ["setting"],
        [*columns, "dB", "weights"],
        f"{inspection.model} in {inspection.dtype}, {dense} of weights; errors: mean over layers, and of all together",
    )
    for name in inspection.settings:
        totals = summary.total(inspection, name)
        errors = [
            f"{100 * each[m]:.3f}" if m in each else ""
            for m in summary.metrics()
            if m == summary.WEIGHT or has_output
            for each in (totals.mean, totals.whole)
        ]
        snr = "" if totals.snr_db is None else f"{totals.snr_db:.2f}"
        table.add_row(name, str(totals.quantized), str(totals.left), *errors, snr, summary.size(totals.nbytes))
    return table
