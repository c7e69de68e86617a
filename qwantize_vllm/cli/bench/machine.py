"""What a measurement was made on: the device and the versions."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from qwantize_vllm import __version__


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}, torch threads: {torch.get_num_threads()})"


def versions(*others: str) -> dict[str, str | None]:
    """Of this package and what its speed depends on, and of other distributions; None for what is not installed."""
    found: dict[str, str | None] = {"qwantize-vllm": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", *others):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
