"""Launches that are recorded once and then repeated, for tensors of the same kind at other addresses.

A launch of a Triton kernel costs its host some 100 us (Triton 3.6, a driver that does nothing): what to launch is
chosen and checked, descriptors are made, and Triton finds out of each argument what it has compiled for. For an 8B
Llama vLLM captures 102 CUDA graphs, and runs each once before, which makes 26,000 launches. Nearly all are like one
before: only addresses differ. Of such a launch all is known but the tensors.

What this relies on, in Triton 3.6 to 3.9: `kernel[grid](...)` returns the compiled kernel, and `compiled[grid](...)`
launches it with all arguments of the kernel in their order, constants included, as Triton's tutorials do; it looks at
nothing but their addresses and values, and at a TensorDescriptor's attributes. An address may be given as a number,
which spares the driver from being asked what it belongs to. All that `compiled[grid]` does itself is to find the
stream, and to tell hooks of the launch; where there are none, `compiled.run` is called as it would. What Triton
specializes on must be in the key: dtypes, numbers, and whether addresses are multiples of 16. Where a launch is not
understood (another version, kernels that are interpreted) it is not recorded.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from qwantize_vllm.matmul.launcher import ALIGNMENT, arguments_behind, launcher
from qwantize_vllm.matmul.partial_sums import area_of_stream, is_area
from qwantize_vllm.triton_launch import Launch, launch_now

# Runs a product through launchers that get this launch: (launch) -> y.
Run = Callable[[Launch], torch.Tensor]

_MOST = 4096  # recordings: some 50 sizes of graphs for each kind of layer, and what else comes along
_recordings: dict[Hashable, Recording | None] = {}
_UNKNOWN: Any = object()


def replay_or_run(key: Hashable, inputs: Sequence[torch.Tensor | None], run: Run) -> torch.Tensor:
    """The result of `run`, from a recording where there is one.

    Args:
        key: says everything of a call but the addresses of its tensors.
        inputs: the tensors that the launch may have as arguments; others are the result and at most one of scratch,
            both uninitialized, and the area of the current stream (partial_sums.py).
        run: see Run. What it launches depends on key and inputs alone.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
    if functools.reduce(operator.or_, addresses) % ALIGNMENT:
        return run(launch_now)
    recording = _recordings.get(key, _UNKNOWN)
    if recording is _UNKNOWN:
        recorder = _Recorder()
        y = run(recorder)
        if recorder.calls:  # else it was not to be recorded this time
            if len(_recordings) >= _MOST:
                _recordings.clear()
            _recordings[key] = recorder.recording(inputs, y)
        return y
    replayed = None if recording is None else recording.replay(inputs, addresses)
    return run(launch_now) if replayed is None else replayed


class _Recorder:
    """A launch (triton_launch.py) that remembers what it was given, and what Triton made of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.calls.append((launch_now(kernel, grid, *arguments, **constants), kernel, grid, arguments, constants))

    def recording(self, inputs: Sequence[torch.Tensor | None], y: torch.Tensor) -> Recording | None:
        """None where this was not one launch of a kind that is understood."""
        if len(self.calls) != 1:
            return None
        compiled, kernel, grid, arguments, constants = self.calls[0]
        rest = arguments_behind(compiled, kernel, len(arguments), constants)
        if rest is None:
            return None
        recording = Recording(launcher(compiled, y.device.index), (*grid, 1, 1)[:3], y)
        tensors = [*inputs, y]
        for argument in (*arguments, *rest):
            if not recording.add(argument, tensors):
                return None
        return recording


class Recording:
    """A launch without its tensors."""

    def __init__(self, launch: Callable[..., None], grid: tuple[int, ...], y: torch.Tensor) -> None:
        self._launch, self._grid, self._arguments = launch, grid, list[Any]()
        # Places among the arguments, and which tensor belongs there: an input by its number, then y, then scratch.
        self._addresses: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int, Callable[[torch.Tensor | None], Any]]] = []
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
            self._addresses.append((place, number))
            self._arguments[place] = None
        elif isinstance(getattr(argument, "base", None), torch.Tensor):
            number = _index(argument.base, tensors)
            if number is None:
                return False
            self._descriptors.append((place, number, _without_base(argument)))
            self._arguments[place] = None
        return True

    def replay(self, inputs: Sequence[torch.Tensor | None], addresses: list[int]) -> torch.Tensor | None:
        """The result; None where it cannot be had in this way, for want of an area.

        addresses: those of inputs, to which others are added.
        """
        arguments = self._arguments.copy()
        if self._area is not None:
            place, words = self._area
            arguments[place] = area_of_stream(self._device, words)
            if arguments[place] is None:
                return None
        y = self._y()
        addresses.append(y.data_ptr())
        if self._scratch is not None:
            scratch = self._scratch()  # which must be there until the launch is under way
            addresses.append(scratch.data_ptr())
        for place, number in self._addresses:
            arguments[place] = addresses[number]
        for place, number, descriptor in self._descriptors:
            arguments[place] = descriptor(y if number == len(inputs) else inputs[number])
        self._launch(self._grid, *arguments)
        return y


def _index(tensor: torch.Tensor, tensors: list[torch.Tensor | None]) -> int | None:
    return next((number for number, each in enumerate(tensors) if each is tensor), None)


def _make(like: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Makes such tensors; torch.empty would take twice as long."""
    shape, stride, dtype, device = like.shape, like.stride(), like.dtype, like.device
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)


class _Based:
    """What is left of a TensorDescriptor when all but its tensor has become part of its class."""

    __slots__ = ("base",)

    def __init__(self, base: torch.Tensor | None) -> None:
        self.base = base


def _without_base(descriptor: Any) -> type[_Based]:
    """Makes such descriptors of other tensors: a copy of this one would take four times as long."""
    rest = {name: value for name, value in vars(descriptor).items() if name != "base"}
    return type(type(descriptor).__name__, (_Based,), {"__slots__": (), **rest})
