"""What the launchers ask of a GPU; of a CPU, where kernels are interpreted, answers that lead tests everywhere."""

from __future__ import annotations

import functools

import torch

# Few, so that K is split in tests.
_INTERPRETED_MULTIPROCESSORS = 2
_INTERPRETED_MAJOR = 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability_major(device: torch.device) -> int | None:
    """The major version of an NVIDIA GPU's compute capability; None for a GPU of AMD."""
    if device.type != "cuda":
        return _INTERPRETED_MAJOR
    return None if torch.version.hip else torch.cuda.get_device_capability(device)[0]
