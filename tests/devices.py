"""Where a kernel under test runs."""

from __future__ import annotations

import pytest
import torch


def kernel_device(where: str) -> str:
    """The device for a test parameter: "reference" and "cpu" on the CPU, a kernel "interpreted" there or on "cuda"."""
    if where == "interpreted" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are tested compiled")
    return "cuda" if where == "cuda" else "cpu"
