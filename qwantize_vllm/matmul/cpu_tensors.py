"""Tensors as the LLVM kernels read them."""

from __future__ import annotations

import functools

import torch

from qwantize_vllm.format import e4m3_by_byte


def adjacent(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy of it, whose columns lie side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@functools.cache
def half_scales() -> torch.Tensor:
    """float32 (256,), half the value of each E4M3 byte: the kernels decode codes to twice theirs."""
    return e4m3_by_byte() / 2
