"""How kernels are launched: what a launcher ends with may be another function, that compiles or records them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwantize_vllm.triton_keys import settle_key

# (kernel, grid, its arguments, its constants) -> whatever, which a launcher does not look at
Launch = Callable[..., object]


def launch_now(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
    """Returns what Triton does: the compiled kernel, where it has compiled one."""
    settle_key(kernel)
    return kernel[grid](*arguments, **constants)


def compile_now(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
    """As `launch_now`, but the kernel is not launched; tensors may be on the meta device."""
    settle_key(kernel)
    return kernel.warmup(*arguments, grid=grid, **constants)
