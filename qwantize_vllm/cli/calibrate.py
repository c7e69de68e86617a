"""`qwantize calibrate`: measure the Hessians that `scale_search: hessian` and `refine: gptq` need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qwantize_vllm.cli.setting_names import settings_named
from qwantize_vllm.cli.unquantized import check_unquantized
from qwantize_vllm.hessian import merge_hessians

_DEFAULT_OUT = "hessians.safetensors"


def run_calibration(
    model: Annotated[str | None, typer.Argument(help="Model name or directory, as `vllm serve` takes it.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="UTF-8 text, or .jsonl, a chat (messages) or a text in every line.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"File to write; default: {_DEFAULT_OUT}, but for --merge.")] = None,
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure on, at most.")] = 32768,
    first_token: Annotated[int, typer.Option(min=0, help="Token of the texts at which to begin.")] = 0,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a window; each is read alone.")] = 1024,
    each_line: Annotated[
        bool, typer.Option(help="Read every line of a .jsonl alone, with special tokens, as encoders read sentences.")
    ] = False,
    block_size: Annotated[int, typer.Option(help="16 or 32, that of the settings it is for.")] = 16,
    full: Annotated[
        bool, typer.Option("--full", help="All of every Hessian, for refine: gptq; 4*K*K bytes a layer.")
    ] = False,
    setting: Annotated[
        str | None,
        typer.Option(
            help="naive, optimal, or a YAML file of settings: quantize the model so before, for the inputs "
            "that its layers then have."
        ),
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="As in vLLM.")] = 1,
    merge: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Add up such files instead; repeat it.")
    ] = None,
) -> None:
    """Hessians (sums of x x' over each layer's inputs, by blocks of them) of a text, by the engine that will serve.

    Serve with them: --additional-config '{"qwantize": {"scale_search": "hessian", "hessian": "hessians.safetensors"}}'
    """
    console = Console(markup=False)
    try:
        if merge:
            if model or text:
                raise ValueError("--merge takes files that are there; leave MODEL and --text out")
            if out is None:
                raise ValueError("--merge needs --out, the file to write the sums to")
            info = merge_hessians(merge, out)
            console.print(f"wrote {out}: {info.tokens:,} tokens of {len(merge)} files")
            return
        if not (model and text):
            raise ValueError("give MODEL and --text, or files to --merge")
        out = out or Path(_DEFAULT_OUT)
        if out.resolve().parent == Path(model).resolve():
            raise ValueError(
                f"--out {out} is in the model's directory, where vLLM would take it for weights; choose another"
            )
        if full and tensor_parallel_size > 1:
            raise ValueError(
                f"--full with --tensor-parallel-size {tensor_parallel_size}: a rank sees only some of the inputs of "
                "row-parallel layers; measure on one rank"
            )
        check_unquantized(model)
        if each_line and (others := [path for path in text if path.suffix != ".jsonl"]):
            raise ValueError(f"--each-line reads lines of .jsonl files, {others[0]} is none")
        if out.is_dir():
            raise ValueError(f"--out {out} is a directory; name the file to write")
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = None if setting is None else settings_named(setting)
        from qwantize_vllm.plugin.calibration import calibrate
        from qwantize_vllm.plugin.corpus import read_windows

        windows = read_windows(model, text, num_tokens, seq_len, first_token, each_line)
        options = {"tensor_parallel_size": tensor_parallel_size}
        info, left = calibrate(model, windows, block_size, out, options, full=full, settings=settings)
    except (ValueError, OSError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    for reason, names in left.items():
        console.print(f"without Hessians, {reason}: {', '.join(names)}")
    console.print(f"wrote {out}: {info.tokens:,} tokens in {len(windows)} windows, config {info.fingerprint}")
