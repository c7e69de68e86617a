"""Options that the benchmarks share: how they are declared, and what of them is checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from qwantize_vllm.cli.bench.shapes import MODELS

_T = TypeVar("_T", bound=str)

BlockSize = Annotated[int, typer.Option(help="16 or 32.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda or cpu. Default: the GPU if there is one.")]
DEFAULT_OUT = Path("bench-results")


def model_option(layers: str, default: str) -> Any:
    """For list[str] | None; says which layers of a model are meant, and what a GPU gets if none is named."""
    return typer.Option(help=f"{layers} of a model: {', '.join(MODELS)}. Repeat it. Default on a GPU: {default}.")


def shape_option(form: str) -> Any:
    """For list[str] | None."""
    return typer.Option(help=f"A weight {form}, such as 2560x9728. Repeat it.")


def dtype_option(of: str, dtypes: Iterable[str]) -> Any:
    """For str, checked by `one_of`."""
    return typer.Option(help=f"Of {of}: {', '.join(dtypes)}.")


def out_option(command: str) -> Any:
    """For Path, by default DEFAULT_OUT, made by `make_directory`."""
    return typer.Option(help=f"Directory for {command}.json and {command}.png.")


def one_of(option: str, value: str, allowed: Iterable[_T]) -> _T:
    """The allowed value that is equal to the one given.

    Raises:
        ValueError: there is none; says which there are.
    """
    allowed = tuple(allowed)
    for each in allowed:
        if each == value:
            return each
    raise ValueError(f"{option} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def choose_device(name: str | None) -> torch.device:
    """The device named, by default the GPU if there is one.

    Raises:
        ValueError: torch cannot use it, or it is neither a GPU nor a CPU.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda or cpu, got {name!r}")
    return device


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes a GPU the current one, whose streams and events are used where none is named."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def make_directory(out: Path) -> None:
    """Make the directory for the results, before anything is measured."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out: {error}") from error
