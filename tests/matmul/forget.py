"""Kernels as in a new process."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import qwantize_vllm.matmul
import qwantize_vllm.search


def own_kernels() -> Iterator[Any]:
    """What Triton compiles of matmul and search, kernels and the functions that they call."""
    from triton.runtime.jit import JITFunction

    for package in (qwantize_vllm.matmul, qwantize_vllm.search):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            yield from (each for each in vars(module).values() if isinstance(each, JITFunction))


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is in this process's memory; Triton's cache on the disk stays."""
    from qwantize_vllm.matmul import launcher, replay

    for kernel in own_kernels():
        kernel.device_caches.clear()
    monkeypatch.setattr(replay, "_recordings", {})
    monkeypatch.setattr(launcher, "_launchers", {})
