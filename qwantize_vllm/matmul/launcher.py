"""Launches of a kernel that Triton has compiled, without asking Triton again what it has compiled.

`kernel[grid](...)` costs its host 60 to 130 us (Triton 3.6, the host of an H200), most of it for finding out of each
argument what the kernel was compiled for. What it returns, the compiled kernel, can be launched without that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from qwantize_vllm.triton_launch import launch_now

ALIGNMENT = 16  # of addresses and sizes: Triton compiles for multiples of it
_MOST = 4096  # kinds: far more than models have
# With each its kernel, whose id is then no other's.
_launchers: dict[Hashable, tuple[Any, Callable[..., None] | None]] = {}
_BY_TYPE = (type(None), float, bool)


def launch_again(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """As `launch_now`. From the second launch of a kind on, the compiled kernel is launched.

    A launch's kind is all that Triton compiles for: of tensors the dtype, of numbers whether they are 1 and which type
    they need, of both whether they are multiples of 16, and constants as they are.
    """
    device: int | None = None
    kinds: list[Hashable] = []
    values: list[Any] = []
    for argument in arguments:
        kind: Any = type(argument)
        if kind is int:
            # 0 or -1 is an i32. Not all kernels are compiled for 1 and for multiples of 16.
            kinds.append((argument >> 31, argument == 1, argument % ALIGNMENT == 0))
            values.append(argument)
        elif isinstance(argument, torch.Tensor):
            if device is None:
                device = argument.get_device()
            address = argument.data_ptr()
            kinds.append((argument.dtype, address % ALIGNMENT == 0))
            values.append(address)
        elif hasattr(argument, "block_shape"):
            # Triton compiles for no more of a TensorDescriptor; the rest is looked at when it is launched.
            kinds.append((kind, argument.base.dtype, *argument.block_shape, argument.layout))
            values.append(argument)
        else:
            kinds.append(kind if kind in _BY_TYPE else (kind, argument))
            values.append(argument)
    # Of constants the types as well: 1, 1.0 and True are equal. A kernel's id, as its hash takes it a lock.
    given = constants.values()
    key = (id(kernel), device, tuple(kinds), *constants, *given, *map(type, given))
    known = _launchers.get(key)
    if known is None:
        compiled = launch_now(kernel, grid, *arguments, **constants)
        if len(_launchers) >= _MOST:
            _launchers.clear()
        _launchers[key] = kernel, _understood(compiled, kernel, len(arguments), constants, device)
    elif (launch := known[1]) is None:
        launch_now(kernel, grid, *arguments, **constants)
    else:
        launch(grid, *values)


def _understood(
    compiled: Any, kernel: Any, given: int, constants: dict[str, Any], device: int | None
) -> Callable[..., None] | None:
    """Launches with a grid and the arguments that were given; None where this is no kernel compiled by Triton."""
    # For AMD Triton also compiles for how large tensors are.
    rest = None if torch.version.hip or device is None else arguments_behind(compiled, kernel, given, constants)
    if rest is None:
        return None
    launch = launcher(compiled, device)
    return lambda grid, *arguments: launch((*grid, 1, 1)[:3], *arguments, *rest)


def arguments_behind(compiled: Any, kernel: Any, given: int, constants: dict[str, Any]) -> list[Any] | None:
    """A kernel's arguments behind those given by place; None where `compiled` is no kernel compiled by Triton, or one
    is missing."""
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel) or not constants.keys() >= set(kernel.arg_names[given:]):
        return None
    return [constants[name] for name in kernel.arg_names[given:]]


def launcher(compiled: Any, device: int | None) -> Callable[..., None]:
    """(grid, *arguments): compiled[grid](*arguments) for a stream of the device, but that it costs nothing to tell
    hooks that are not there. Arguments are all those of the kernel in their order, constants included; a tensor may be
    its address. A grid has three numbers."""
    from triton import knobs
    from triton.runtime import driver

    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of, runtime = driver.active.get_current_stream, knobs.runtime

    def launch(grid: tuple[int, ...], *arguments: Any) -> None:
        if _is_there(runtime.launch_enter_hook) or _is_there(runtime.launch_exit_hook):
            compiled[grid](*arguments)
        else:
            run(*grid, stream_of(device), function, metadata, None, None, None, *arguments)

    return launch


def _is_there(hook: Any) -> bool:
    """Whether somebody wants to know of launches: there are chains of hooks, empty ones, and single hooks."""
    return bool(getattr(hook, "calls", hook))
