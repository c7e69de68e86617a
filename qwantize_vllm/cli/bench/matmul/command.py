"""`qwantize bench matmul`: how fast activations are multiplied with the quantized weight, and how exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from qwantize_vllm.cli.bench.machine import device_name
from qwantize_vllm.cli.bench.matmul import report
from qwantize_vllm.cli.bench.matmul.competitors import OURS, PEERS, Competitor, dense, ours
from qwantize_vllm.cli.bench.matmul.measure import Plan, Results, measure
from qwantize_vllm.cli.bench.matmul.plot import plot
from qwantize_vllm.cli.bench.matmul.summary import rows
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
from qwantize_vllm.cli.bench.shapes import MODELS, SMALL, Layer, choose_layers
from qwantize_vllm.format import check_block_size
from qwantize_vllm.matmul.backends import BACKENDS

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_GPU_TOKENS = [2**i for i in range(14)]
_CPU_TOKENS = [1, 16, 64]
# On a GPU, if no layer is named: all layers of the first, the largest of the second.
_GPU_LAYERS = ("llama-3-8b", "llama-3-70b gate_up")


def bench_matmul(
    model: Annotated[
        list[str] | None, model_option("Linear layers (no experts)", "llama-3-8b, and gate_up of llama-3-70b")
    ] = None,
    shape: Annotated[list[str] | None, shape_option("NxK")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="M, rows of x. Repeat it. Default on a GPU: 1, 2, 4 to 8192.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(OURS)}; repeat it. Default: auto and those made for the device."),
    ] = None,
    block_size: BlockSize = 16,
    dtype: Annotated[str, dtype_option("x", _DTYPES)] = "bfloat16",
    device: Device = None,
    peer: Annotated[bool, typer.Option(help="Compare with the kernels of vLLM too.")] = True,
    check: Annotated[bool, typer.Option(help="Compare with float64.")] = True,
    out: Annotated[Path, out_option("matmul")] = DEFAULT_OUT,
) -> None:
    """Microseconds of the product with a quantized weight, beside the dense one and vLLM's own kernels.

    On a GPU every call runs inside a CUDA graph, with a weight that is not in the L2 cache. Ends with exit code 1
    if a product of this package is not computed, or is too far from float64.
    """
    console = Console(markup=False)  # messages of peers may hold brackets
    plan = _plan(model or [], shape or [], tokens or [], backend or [], block_size, dtype, device, peer, check)
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
    tokens: list[int],
    backends: list[str],
    block_size: int,
    dtype: str,
    device: str | None,
    with_peers: bool,
    check: bool,
) -> Plan:
    """The options, checked, with the defaults of the device."""
    try:
        check_block_size(block_size)
        on = choose_device(device)
        x = torch.empty(1, block_size, dtype=_DTYPES[one_of("--dtype", dtype, _DTYPES)], device=on)
        missing = {peer.name: peer.why_not(block_size) for peer in PEERS} if with_peers else {}
        peers = [peer.competitor for peer in PEERS if peer.name in missing and missing[peer.name] is None]
        return Plan(
            layers=_layers(models, shapes, block_size, on),
            tokens=sorted(set(tokens)) or (_GPU_TOKENS if on.type == "cuda" else _CPU_TOKENS),
            competitors=[dense(x.dtype), *_backends(backends, x), *peers],
            missing={name: reason for name, reason in missing.items() if reason},
            block_size=block_size,
            dtype=x.dtype,
            device=on,
            check=check,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _layers(models: list[str], shapes: list[str], block_size: int, device: torch.device) -> list[Layer]:
    if models or shapes:
        return choose_layers(models, shapes, block_size, experts=False)
    if device.type == "cpu":
        return choose_layers([], [SMALL], block_size, experts=False)
    layers = choose_layers(list(MODELS), [], block_size, experts=False)
    return [layer for layer in layers if layer.name.startswith(_GPU_LAYERS)]


def _backends(names: list[str], x: torch.Tensor) -> list[Competitor]:
    """The backends named; by default auto and those made for x's device, which leaves out the ones for checking.

    Raises:
        ValueError: there is no such backend, or it cannot multiply x.
    """
    if not names:
        plain = [name for name, backend in BACKENDS.items() if not backend.needs_gpu]
        names = ["auto", "swizzled", "unswizzled"] if x.is_cuda else ["auto", *plain]
    chosen = [ours(one_of("--backend", name, list(OURS))) for name in dict.fromkeys(names)]
    for competitor in chosen:
        if reason := competitor.cannot(x):
            raise ValueError(f"--backend {competitor.name} {reason}")
    return chosen


def _announce(plan: Plan, console: Console) -> None:
    """What the figures will not say by themselves."""
    if plan.device.type == "cpu":
        console.print(
            "On a CPU this is the wall clock over a weight that may stay in the caches: it shows that everything runs, "
            f"not how fast a GPU is. Without --model and --shape it gets one small weight, {SMALL}."
        )
    for name, reason in plan.missing.items():
        console.print(f"{name} is not compared: {reason}")


def _write(plan: Plan, results: Results, out: Path, console: Console) -> None:
    report.write_json(out / "matmul.json", plan, results)
    title = f"{device_name(plan.device)}: a copy reaches {results.copy / 1e9:.0f} GB/s"
    found = rows(plan, results.cells)
    draw(out / "matmul.png", lambda path: plot(path, plan, found, title), out / "matmul.json", console)
