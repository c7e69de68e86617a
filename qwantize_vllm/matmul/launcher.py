"""Launches of a kernel that Triton has compiled, without asking Triton again what it has compiled.

`kernel[grid](...)` costs its host 60 to 130 us (Triton 3.6, the host of an H200), most of it for finding out of each
argument what the kernel was compiled for. What it returns, the compiled kernel, can be launched without that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from qwantize_vllm.matmul.gpu import launch_now

ALIGNMENT = 16  # of addresses and sizes: Triton compiles for multiples of it
_MOST = 4096  # kinds: far more than models have
_launchers: dict[Hashable, Callable[..., None] | None] = {}
_UNKNOWN: Any = object()


def launch_again(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """As `launch_now`. From the second launch of a kind on, the compiled kernel is launched.

    A launch's kind is all that Triton compiles for: of tensors the dtype, of numbers whether they are 1 or need 64
    bits, of both whether they are multiples of 16, and constants as they are.
    """
    device: torch.device | None = None
    kinds, values = list[Hashable](), list[Any]()
    for argument in arguments:
        tensor = argument if isinstance(argument, torch.Tensor) else getattr(argument, "base", None)
        if tensor is not None:
            device, address = tensor.device, tensor.data_ptr()
            described = None if tensor is argument else (tuple(argument.block_shape), argument.layout)
            kinds.append((tensor.dtype, address % ALIGNMENT == 0, described))
            values.append(address if tensor is argument else argument)
        else:
            kinds.append(_kind(argument))
            values.append(argument)
    assert device is not None, "a launch without a tensor"
    key = (kernel, device.index, tuple(kinds), tuple(constants.items()))
    known = _launchers.get(key, _UNKNOWN)
    if known is _UNKNOWN:
        if len(_launchers) >= _MOST:
            _launchers.clear()
        _launchers[key] = _understood(kernel[grid](*arguments, **constants), kernel, len(arguments), constants, device)
    elif known is None:
        launch_now(kernel, grid, *arguments, **constants)
    else:
        known(grid, *values)


def _kind(argument: Any) -> Hashable:
    if type(argument) is int:
        return (argument == 1, argument % ALIGNMENT == 0, argument >> 31)
    return float if type(argument) is float else argument


def _understood(
    compiled: Any, kernel: Any, given: int, constants: dict[str, Any], device: torch.device
) -> Callable[..., None] | None:
    """Launches with a grid and the arguments that were given; None where this is no kernel compiled by Triton."""
    rest = arguments_behind(compiled, kernel, given, constants)
    if rest is None:
        return None
    launch = launcher(compiled, device)
    return lambda grid, *arguments: launch(grid, *arguments, *rest)


def arguments_behind(compiled: Any, kernel: Any, given: int, constants: dict[str, Any]) -> list[Any] | None:
    """A kernel's arguments behind those given by place; None where `compiled` is no kernel compiled by Triton, or one
    is missing."""
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel) or not constants.keys() >= set(kernel.arg_names[given:]):
        return None
    return [constants[name] for name in kernel.arg_names[given:]]


def launcher(compiled: Any, device: torch.device) -> Callable[..., None]:
    """(grid, *arguments): compiled[grid](*arguments) for a stream of the device, but that it costs nothing to tell
    hooks that are not there. Arguments are all those of the kernel in their order, constants included; a tensor may be
    its address."""
    from triton import knobs
    from triton.runtime import driver

    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of, runtime = driver.active.get_current_stream, knobs.runtime

    def launch(grid: tuple[int, ...], *arguments: Any) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        if _is_there(runtime.launch_enter_hook) or _is_there(runtime.launch_exit_hook):
            compiled[x, y, z](*arguments)
        else:
            run(x, y, z, stream_of(device.index), function, metadata, None, None, None, *arguments)

    return launch


def _is_there(hook: Any) -> bool:
    """Whether somebody wants to know of launches: there are chains of hooks, empty ones, and single hooks."""
    return bool(getattr(hook, "calls", hook))
