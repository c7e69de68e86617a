"""`qwantize bench quantize`: how fast weights are quantized, and whether they come out exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from qwantize_vllm.cli.bench import report
from qwantize_vllm.cli.bench.machine import device_name
from qwantize_vllm.cli.bench.measure import Plan, Results, Search, measure
from qwantize_vllm.cli.bench.options import (
    DEFAULT_OUT,
    BlockSize,
    Device,
    choose_device,
    dtype_option,
    make_directory,
    model_option,
    on_device,
    one_of,
    out_option,
    shape_option,
)
from qwantize_vllm.cli.bench.output import draw
from qwantize_vllm.cli.bench.peers import PEERS
from qwantize_vllm.cli.bench.plot import plot
from qwantize_vllm.cli.bench.shapes import MODELS, SMALL, choose_layers
from qwantize_vllm.format import FLOAT_DTYPES, check_block_size
from qwantize_vllm.search.quantize import GlobalScale, ScaleSearch

_DEFAULT_SEARCHES = [Search(scales) for scales in get_args(ScaleSearch)]
_SEARCHES = {str(search): search for search in [*_DEFAULT_SEARCHES, Search("hessian", "codes")]}
_GLOBAL_SCALES: tuple[GlobalScale, ...] = get_args(GlobalScale)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def bench_quantize(
    model: Annotated[list[str] | None, model_option("Layers", "all")] = None,
    shape: Annotated[list[str] | None, shape_option("NxK, or ExNxK (experts)")] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(help="naive, optimal, hessian or hessian+codes; repeat it. Default: all but the last."),
    ] = None,
    block_size: BlockSize = 16,
    global_scale: Annotated[str, typer.Option(help="amax or none.")] = "amax",
    dtype: Annotated[str, dtype_option("the weights", _DTYPES)] = "bfloat16",
    device: Device = None,
    check_blocks: Annotated[
        int, typer.Option(min=1, help="Blocks of each weight that are checked by float64 brute force.")
    ] = 4096,
    out: Annotated[Path, out_option("quantize")] = DEFAULT_OUT,
) -> None:
    """Milliseconds, GB/s and fraction of a copy's bandwidth of every search, checked in the same run.

    Ends with exit code 1 if a sampled block is not what its search promises.
    """
    console = Console(markup=False)  # messages of peers may hold brackets
    plan = _plan(model or [], shape or [], search or [], block_size, global_scale, dtype, device, check_blocks)
    make_directory(out)
    _announce(plan, console)
    with on_device(plan.device):
        results = measure(plan)
    report.show(plan, results, console)
    _write(plan, results, out, console)
    if results.failures:
        raise typer.Exit(1)


def _plan(
    models: list[str],
    shapes: list[str],
    searches: list[str],
    block_size: int,
    global_scale: str,
    dtype: str,
    device: str | None,
    check_blocks: int,
) -> Plan:
    """The options, checked, with the defaults of the device."""
    try:
        check_block_size(block_size)
        on = choose_device(device)
        if not (models or shapes):
            models, shapes = (list(MODELS), []) if on.type == "cuda" else ([], [SMALL])
        return Plan(
            layers=choose_layers(models, shapes, block_size),
            searches=[_SEARCHES[one_of("--search", name, tuple(_SEARCHES))] for name in dict.fromkeys(searches)]
            or _DEFAULT_SEARCHES,
            peers=[peer for peer in PEERS if peer.importable],
            block_size=block_size,
            global_scale=one_of("--global-scale", global_scale, _GLOBAL_SCALES),
            dtype=_DTYPES[one_of("--dtype", dtype, tuple(_DTYPES))],
            device=on,
            check_blocks=check_blocks,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _announce(plan: Plan, console: Console) -> None:
    """What the figures will not say by themselves."""
    if plan.device.type == "cpu":
        console.print(
            "On a CPU it is the PyTorch reference that is timed, not the Triton kernels; "
            f"without --model and --shape it gets one small weight, {SMALL}."
        )
    for peer in PEERS:
        if peer not in plan.peers:
            console.print(f"{peer.package} is not installed, so not compared: pip install {peer.package}")


def _write(plan: Plan, results: Results, out: Path, console: Console) -> None:
    report.write_json(out / "quantize.json", plan, results)
    title = f"{device_name(plan.device)}: a copy reaches {results.copy / 1e9:.0f} GB/s"
    draw(out / "quantize.png", lambda path: plot(path, results.rows, title), out / "quantize.json", console)
