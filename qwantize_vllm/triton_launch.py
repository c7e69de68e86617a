"""How kernels are launched: what a launcher ends with may be another function, that compiles or records them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# (kernel, grid, its arguments, its constants) -> whatever, which a launcher does not look at
Launch = Callable[..., object]


def launch_now(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)
