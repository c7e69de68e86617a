"""Engines write much: here it goes to a file, and what a script has to say to the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def log_to(path: str | Path) -> Callable[[str], None]:
    """Send all that this process, and those that it starts, write from now on to a file; returns what still prints a
    line where it went before."""
    terminal = os.fdopen(os.dup(1), "w", buffering=1)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def say(line: str) -> None:
        terminal.write(f"{line}\n")

    return say


def tail(path: Path) -> str:
    """The end of such a file."""
    return path.read_text(errors="replace")[-2500:] if path.exists() else f"{path} was not written"
