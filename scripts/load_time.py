#!/usr/bin/env python3
"""Time from nothing to a ready engine, and GPU memory on the way: qwantize against plain bf16, from the same files.

    .venv/bin/python scripts/load_time.py [--shape llama-3-8b] [--layers N] [--starts 3] [--folder DIR]

Writes a checkpoint of random weights (16 GB for llama-3-8b; gone at the end, unless --keep), then starts one engine
after the other, with qwantize and without, without and with, and so on, each in a process of its own: an even number of
starts, with --fresh, favours neither. The first start of either finds no compiled kernel; later ones find what the
first has left, but with --fresh. "ready" is the time that `vllm.LLM(...)` takes, without importing vLLM. Files are in
the system's cache, the checkpoint's as they have just been written (and are on the disk), those of libraries as one
layer of the model is started before with each method, which does not count (--skip-one-layer where they have just been
read): --evict has every start read the checkpoint from the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from engine_log import log_to, tail
from random_checkpoint import is_written, llama_config, write_checkpoint
from rich.console import Console
from rich.table import Table

from qwantize_vllm.plugin.engine_process import engine, in_own_process

METHODS = {"qwantize": "qwantize", "bf16": None}
GIB = 2**30
# Folders for what a start leaves to the next one, by the variables that say where.
_CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "XDG_CACHE_HOME": "others",
}

app = typer.Typer(add_completion=False)
console = Console(width=140)


@dataclasses.dataclass(frozen=True)
class Start:
    """One start; first: whether it found no compiled kernel; figures: of MeasuredWorker, and `ready`."""

    method: str
    number: int
    first: bool
    figures: dict[str, Any]


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Option(help="Shape of the model: llama-3-8b or tiny.")] = "llama-3-8b",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the shape has.")] = None,
    starts: Annotated[int, typer.Option(min=1, help="Starts with each method.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where to put everything; default: a temporary folder.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the checkpoint there, and use one that is there.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Have no start find what an earlier one compiled.")] = False,
    evict: Annotated[bool, typer.Option("--evict", help="Have files read from the disk.")] = False,
    skip_one_layer: Annotated[
        bool, typer.Option("--skip-one-layer", help="No starts before: the files of libraries have just been read.")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile and CUDA graphs.")] = False,
    utilization: Annotated[float, typer.Option(help="vLLM's gpu_memory_utilization.")] = 0.9,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON, after every start.")] = None,
) -> None:
    try:
        config = llama_config(shape, layers)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    options = {"enforce_eager": eager, "gpu_memory_utilization": utilization, "max_model_len": 2048}
    with _work_folder(folder) as work, _checkpoint(work, shape, config, keep) as checkpoint:
        failed = 0 if skip_one_layer else _start_one_layer(shape, work, options)
        done: list[Start] = []
        for number in range(1, starts + 1):
            # There and back: what comes later finds more in the system's cache.
            for method in METHODS if number % 2 else reversed(METHODS):
                if evict:
                    _evict(checkpoint)
                start = _try(method, number, fresh or number == 1, checkpoint, work, options)
                if start is None:
                    failed += 1
                    continue
                done.append(start)
                _show_start(done[-1])
                if out:
                    out.write_text(json.dumps([dataclasses.asdict(each) for each in done], indent=1) + "\n")
        _show(done)
    sys.exit(1 if failed else 0)


@contextlib.contextmanager
def _work_folder(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


@contextlib.contextmanager
def _checkpoint(work: Path, shape: str, config: dict[str, Any], keep: bool) -> Iterator[Path]:
    """The checkpoint to start: written now and gone at the end, or with `keep` one that may be there and stays."""
    checkpoint = work / f"{shape}-{config['num_hidden_layers']}-layers"
    try:
        there = is_written(checkpoint, config)
    except FileExistsError as error:
        raise typer.BadParameter(str(error)) from None
    if there and not keep:
        raise typer.BadParameter(f"{checkpoint} is there: use it with --keep, or remove it")
    if there:
        console.print(f"{checkpoint} is there")
    else:
        _write(checkpoint, config)
    try:
        yield checkpoint
    finally:
        if not keep:
            shutil.rmtree(checkpoint)


def _write(checkpoint: Path, config: dict[str, Any]) -> None:
    began = time.perf_counter()
    size = write_checkpoint(checkpoint, config)
    os.sync()  # or the system writes them to the disk during the first starts
    console.print(f"{checkpoint}: {size / GIB:.2f} GiB written in {time.perf_counter() - began:.1f} s")


def _start_one_layer(shape: str, work: Path, options: dict[str, Any]) -> int:
    """So that no first start pays for what others find in the system's cache; returns how many of the starts failed."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        checkpoint = Path(folder) / f"{shape}-one-layer"
        _write(checkpoint, llama_config(shape, 1))
        return sum(_try(method, 0, True, checkpoint, work, options) is None for method in METHODS)


def _try(method: str, number: int, first: bool, checkpoint: Path, work: Path, options: dict[str, Any]) -> Start | None:
    """None if it failed, which is printed."""
    try:
        return _start(method, number, first, checkpoint, work, options)
    except Exception as error:
        console.print(f"FAILED: start {number} of {method}: {type(error).__name__}: {error}", markup=False)
        console.print(tail(_log_of(work, method, number)), markup=False)
        return None


def _start(method: str, number: int, first: bool, checkpoint: Path, work: Path, options: dict[str, Any]) -> Start:
    caches = work / f"caches-{method}"
    if first:
        shutil.rmtree(caches, ignore_errors=True)
    log = _log_of(work, method, number)
    figures = in_own_process(_measure, str(checkpoint), METHODS[method], str(caches), str(log), options)
    return Start(method, number, first, figures)


def _evict(folder: Path) -> None:
    """Have the system forget what it has of a folder's files in memory."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _measure(model: str, quantization: str | None, caches: str, log: str, options: dict[str, Any]) -> dict[str, Any]:
    log_to(log)
    os.environ |= {variable: f"{caches}/{name}" for variable, name in _CACHES.items()}
    import vllm  # noqa: F401

    worker = {"worker_cls": "measured_worker.MeasuredWorker", "skip_tokenizer_init": True}
    began = time.perf_counter()
    with engine(model=model, quantization=quantization, **worker, **options) as llm:
        ready = time.perf_counter() - began
        (figures,) = llm.collective_rpc("figures")
        return {"ready": ready, **figures}


def _log_of(work: Path, method: str, number: int) -> Path:
    return work / f"{method}-{number}.log"


def _show_start(start: Start) -> None:
    figures = start.figures
    parts = [f"ready {figures['ready']:.1f} s", f"load {figures['load']:.1f}"]
    if "quantize" in figures:
        parts.append(f"of which quantize {figures['quantize']:.2f}")
    parts += [f"{name} {figures[key]:.1f}" for key, name in _LATER.items() if key in figures]
    if "compiled" in figures:
        written = sum(seconds for name, seconds in figures["compiled"].items() if not name.startswith("triton_"))
        parts.append(f"kernels compiled on the way, Inductor's aside, {written:.1f}")
    if "peak_allocated" in figures:
        over = figures["peak_allocated"] - figures["weights"]
        parts.append(f"weights {figures['weights'] / GIB:.2f} GiB, peak of the load +{over / GIB:.2f} GiB")
    kind = "first" if start.first else "later"
    console.print(f"{start.method}, start {start.number} ({kind}): {', '.join(parts)}")


_LATER = {"profile": "profile and compile", "warm_up": "warm-up and graphs"}


def _show(done: list[Start]) -> None:
    table = Table(title="seconds, medians")
    rows = {"ready": "ready", "load": "load the weights", "quantize": "of which quantize", **_LATER}
    columns = {
        f"{method}, {when}": [each.figures for each in done if each.method == method and each.first is first]
        for when, first in (("first", True), ("later", False))
        for method in METHODS
    }
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for key, label in rows.items():
        medians = [_median([each[key] for each in figures if key in each]) for figures in columns.values()]
        table.add_row(label, *("" if median is None else f"{median:.2f}" for median in medians))
    console.print(table)
    _show_ratios(columns)
    _show_memory(done)


def _show_ratios(columns: dict[str, list[dict[str, Any]]]) -> None:
    for when in ("first", "later"):
        ours, plain = (_median([each["ready"] for each in columns[f"{method}, {when}"]]) for method in METHODS)
        if ours is not None and plain is not None:
            console.print(f"time to ready, {when} starts: {ours / plain:.3f} times that of bf16")


def _show_memory(done: list[Start]) -> None:
    for method in METHODS:
        figures = [each.figures for each in done if each.method == method and "peak_allocated" in each.figures]
        if figures:
            weights, peak, reserved = (
                max(each[key] for each in figures) / GIB for key in ("weights", "peak_allocated", "peak_reserved")
            )
            console.print(
                f"{method}: weights {weights:.2f} GiB; while loading, PyTorch had allocated up to {peak:.2f} GiB "
                f"(+{peak - weights:.2f}) and reserved up to {reserved:.2f} GiB (+{reserved - weights:.2f})"
            )


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


if __name__ == "__main__":
    app()
