"""Scratch in which the programs of a launch give each other partial sums, and nothing but these.

A word there is EMPTY until a program leaves a sum in it; the program that waits for the sum reads the word until it is
not, adds, and makes it EMPTY again (gluon_sums.py). So there are no flags, and no fences between sums and flags.
FlashInfer's and TensorRT-LLM's all-reduce for small messages ("Lamport") synchronize in this way.

An area must stay as it is. So none may be made while a model is loaded: vLLM's sleep forgets what was allocated then.

All launches of a stream use the same area, one after the other; launches on two streams may overlap, so each stream has
its own (17 MB on an H200), and there is a spare one. A CUDA graph holds the area of the stream that captured it. Two
graphs that were captured on one stream must not run at once.
"""

from __future__ import annotations

import dataclasses
import functools
import threading

import torch

# As a float32 a NaN that no product and no sum is: those that hardware makes have other bits, and what is left here is
# kept from having these.
EMPTY = -1


@dataclasses.dataclass
class _Areas:
    """Of a device: areas by the handle of their stream, and one that no stream has yet."""

    of_streams: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    spare: torch.Tensor | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


@functools.cache
def _areas(device: torch.device) -> _Areas:
    return _Areas()


def area_of_stream(device: torch.device, words: int) -> torch.Tensor | None:
    """int32 (at least words,), all EMPTY wherever no launch of the current stream is under way; None where there is
    none and none can be made, since a graph is being captured.

    device: of a tensor, so with its index. words: the same number each time, for a device.
    """
    # What torch.cuda.current_stream makes a Stream of, which costs a launch as much as all the rest here.
    areas, stream = _areas(device), torch._C._cuda_getCurrentRawStream(device.index)
    if stream not in areas.of_streams or areas.spare is None:
        with areas.lock:
            _provide(areas, stream, words, device)
    return areas.of_streams.get(stream)


def is_area(tensor: torch.Tensor) -> bool:
    """Whether it is what `area_of_stream` has answered."""
    return any(tensor is area for area in _areas(tensor.device).of_streams.values())


def _provide(areas: _Areas, stream: int, words: int, device: torch.device) -> None:
    """An area for the stream, if there can be one, and a spare one for a stream that is met while it captures."""
    capturing = torch.cuda.is_current_stream_capturing()
    if areas.spare is None and not capturing:
        areas.spare = _make(words, device)
    if stream not in areas.of_streams and areas.spare is not None:
        areas.of_streams[stream], areas.spare = areas.spare, None if capturing else _make(words, device)


def _make(words: int, device: torch.device) -> torch.Tensor:
    area = torch.full((words,), EMPTY, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # another stream may use it
    return area
