"""Launches that are recorded once and then repeated, for tensors of the same kind at other addresses.

A launch of a Triton kernel costs its host some 100 us (Triton 3.6, a driver that does nothing): what to launch is
chosen and checked, descriptors are made, and Triton finds out of each argument what it has compiled for. For an 8B
Llama vLLM captures 102 CUDA graphs, and runs each once before, which makes 26,000 launches. Nearly all are like one
before: only addresses differ. Of such a launch all is known but the tensors.

What this relies on, in Triton 3.6 to 3.9: `kernel[grid](...)` returns the compiled kernel, and `compiled[grid](...)`
launches it with all arguments of the kernel in their order, constants included, as Triton's tutorials do; it looks at
nothing but their addresses and values, and at a TensorDescriptor's attributes. What Triton specializes on must be in
the key: dtypes, numbers, and whether addresses are multiples of 16. Where a launch is not understood (another version,
kernels that are interpreted) it is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from qwantize_vllm.matmul.gpu import Launch, launch_now
from qwantize_vllm.matmul.partial_sums import area_of_stream, is_area

# Runs a product through launchers that get this launch: (launch) -> y.
Run = Callable[[Launch], torch.Tensor]

_ALIGNMENT = 16
_MOST = 4096  # recordings: some 50 sizes of graphs for each kind of layer, and what else comes along
_recordings: dict[Hashable, Recording | None] = {}


def replay_or_run(key: Hashable, inputs: Sequence[torch.Tensor | None], run: Run) -> torch.Tensor:
    """The result of `run`, from a recording where there is one.

    Args:
        key: says everything of a call but the addresses of its tensors.
        inputs: the tensors that the launch may have as arguments; others are the result and at most one of scratch,
            both uninitialized, and the area of the current stream (partial_sums.py).
        run: see Run. What it launches depends on key and inputs alone.
    """
    if any(tensor is not None and tensor.data_ptr() % _ALIGNMENT for tensor in inputs):
        return run(launch_now)
    if key in _recordings:
        recording = _recordings[key]
        y = None if recording is None else recording.replay(inputs)
        return run(launch_now) if y is None else y
    recorder = _Recorder()
    y = run(recorder)
    if len(_recordings) >= _MOST:
        _recordings.clear()
    _recordings[key] = recorder.recording(inputs, y)
    return y


class _Recorder:
    """A launch (gpu.py) that remembers what it was given, and what Triton made of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.calls.append((kernel[grid](*arguments, **constants), kernel, grid, arguments, constants))

    def recording(self, inputs: Sequence[torch.Tensor | None], y: torch.Tensor) -> Recording | None:
        """None where this was not one launch of a kind that is understood."""
        if len(self.calls) != 1:
            return None
        compiled, kernel, grid, arguments, constants = self.calls[0]
        from triton.compiler import CompiledKernel

        names = kernel.arg_names[len(arguments) :]
        if not isinstance(compiled, CompiledKernel) or any(name not in constants for name in names):
            return None
        recording = Recording(compiled[(*grid, 1, 1)[:3]], y)
        tensors = [*inputs, y]
        for argument in (*arguments, *(constants[name] for name in names)):
            if not recording.add(argument, tensors):
                return None
        return recording


class Recording:
    """A launch without its tensors."""

    def __init__(self, launch: Callable[..., None], y: torch.Tensor) -> None:
        self._launch, self._arguments = launch, list[Any]()
        # Places among the arguments, and which tensor belongs there: an input by its number, then y, then scratch.
        self._tensors: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int]] = []
        self._y, self._device = _make(y), y.device
        self._scratch: Callable[[], torch.Tensor] | None = None
        self._area: tuple[int, int] | None = None  # its place, and how many words are asked for

    def add(self, argument: Any, tensors: list[torch.Tensor | None]) -> bool:
        """The next argument; tensors: the inputs and y. False where it is not understood."""
        place = len(self._arguments)
        self._arguments.append(argument)
        if isinstance(argument, torch.Tensor) and is_area(argument):
            self._area, self._arguments[place] = (place, len(argument)), None
        elif isinstance(argument, torch.Tensor):
            number = _index(argument, tensors)
            if number is None:
                if self._scratch is not None:
                    return False
                number, self._scratch = len(tensors), _make(argument)
            self._tensors.append((place, number))
            self._arguments[place] = None
        elif isinstance(getattr(argument, "base", None), torch.Tensor):
            number = _index(argument.base, tensors)
            if number is None:
                return False
            self._descriptors.append((place, number))
            self._arguments[place] = _with_base(argument, None)
        return True

    def replay(self, inputs: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """The result; None where it cannot be had in this way, for want of an area."""
        arguments = self._arguments.copy()
        if self._area is not None:
            place, words = self._area
            arguments[place] = area_of_stream(self._device, words)
            if arguments[place] is None:
                return None
        y = self._y()
        tensors = [*inputs, y]
        if self._scratch is not None:
            tensors.append(self._scratch())
        for place, number in self._tensors:
            arguments[place] = tensors[number]
        for place, number in self._descriptors:
            arguments[place] = _with_base(arguments[place], tensors[number])
        self._launch(*arguments)
        return y


def _index(tensor: torch.Tensor, tensors: list[torch.Tensor | None]) -> int | None:
    return next((number for number, each in enumerate(tensors) if each is tensor), None)


def _make(like: torch.Tensor) -> Callable[[], torch.Tensor]:
    shape, dtype, device = like.shape, like.dtype, like.device
    return lambda: torch.empty(shape, dtype=dtype, device=device)


def _with_base(descriptor: Any, base: torch.Tensor | None) -> Any:
    """A copy of a TensorDescriptor, for another tensor: copy.copy, only that this one is five times as fast."""
    copied = object.__new__(type(descriptor))
    copied.__dict__.update(descriptor.__dict__, base=base)
    return copied
