"""`qwantize export` and `qwantize verify`: a quantized checkpoint on disk."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qwantize_vllm.checkpoint import LAYOUTS
from qwantize_vllm.checkpoint.export import check_out, verify
from qwantize_vllm.cli.inspect.files import check_files
from qwantize_vllm.cli.setting_names import settings_named
from qwantize_vllm.cli.unquantized import check_unquantized


def run_export(
    model: Annotated[str, typer.Argument(help="Model name or directory, as `vllm serve` takes it.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it appears when it is complete.")],
    setting: Annotated[
        str, typer.Option(help="naive, optimal, or a YAML file of settings, as for serving.")
    ] = "optimal",
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressed-tensors or modelopt, which vLLM serves without this package, or qwantize, which takes "
            "global_scale: amax_per_member too, and keeps blocks of 32 as they are.",
        ),
    ] = "compressed-tensors",
    dtype: Annotated[
        str, typer.Option(help="As `vllm serve --dtype`: what weights are before they are quantized.")
    ] = "auto",
    shard_size: Annotated[
        float, typer.Option(min=1e-6, help="GiB after which a file ends; as much is held in memory.")
    ] = 1.0,
) -> None:
    """Quantize a checkpoint as `vllm serve --quantization qwantize` would while loading, and keep the result.

    Works in OUT.partial; started again after an interruption, it goes on behind the last file that was complete.
    """
    console = Console(markup=False)
    began = time.perf_counter()
    try:
        if layout not in LAYOUTS:
            raise ValueError(f"--format is {layout!r}; there are {', '.join(LAYOUTS)}")
        settings = settings_named(setting)
        check_files(model)
        check_unquantized(model)
        check_out(out)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the command itself says what it did otherwise
        from qwantize_vllm.plugin.exporting import export_model

        done = export_model(model, out, settings, layout, dtype, int(shard_size * 2**30))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    for name, reason in done.left.items():
        console.print(f"left as it is: {name} ({reason})")
    for name, reason in done.by_optimal.items():
        console.print(f"searched by optimal, not hessian: {name} ({reason})")
    for pattern in done.unused:
        console.print(f"ignore pattern {pattern!r} names no layer of this model")
    console.print(
        f"wrote {out}: {len(done.quantized)} layers quantized, {done.bytes_read / 2**30:.3f} -> "
        f"{done.bytes_written / 2**30:.3f} GiB, {time.perf_counter() - began:.1f} s"
    )


def run_verify(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What `qwantize export` wrote.")],
) -> None:
    """Compare every tensor of an export with the digests that were noted when it was written."""
    try:
        count = verify(directory)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    Console(markup=False).print(f"{directory}: {count} tensors are what was written")
