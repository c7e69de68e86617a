"""Runs the Triton kernels in Triton's interpreter where there is no GPU, compiled where there is one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.devices import kernel_device

# Read when triton is first imported, so before any test module is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tensors are small, and threads that wait for each other on a busy machine can take twenty times as long as one.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: with two files at a time one of them would be alone at the end."""
    longest = ("test_kernels_compile.py", "test_search.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_on(request: pytest.FixtureRequest) -> str:
    """Device of a Triton kernel: the CPU, where it is interpreted, or the GPU."""
    return kernel_device(request.param)


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Triton's interpreter, but for rounding the sum to float32: BLAS gives a column other last bits at other places
    on some CPUs."""
    pytest.importorskip("triton")
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        total = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return TensorHandle(total.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
