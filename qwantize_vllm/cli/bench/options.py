"""Options that the benchmarks share, checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
import typer

_T = TypeVar("_T", bound=str)


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


def make_directory(out: Path) -> None:
    """Make the directory for the results, before anything is measured."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out: {error}") from error
