"""An RMS norm of a sum and SwiGLU's gate as kernels of their own, in Triton.

vLLM has such kernels; its norm writes into x and the residual, which others may still read, and this folder does
without vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.triton_launch import Launch, launch_now

if TYPE_CHECKING:
    from qwantize_vllm.matmul.normed import AddedNorm

_COLUMNS = 1024  # of a program of the gate


def add_norm(x: torch.Tensor, norm: AddedNorm, launch: Launch = launch_now) -> torch.Tensor:
    """x (M, K) -> rms_norm(x + residual) * gain, contiguous; writes norm.sums. Sums and squares are float32."""
    y = torch.empty_like(norm.sums)
    if y.numel():
        launch(
            _add_norm_kernel,
            (y.shape[0],),
            x,
            norm.residual,
            norm.gain,
            norm.sums,
            y,
            x.shape[1],
            x.stride(0),
            norm.residual.stride(0),
            norm.epsilon,
            COLUMNS=triton.next_power_of_2(x.shape[1]),
            num_warps=8 if x.shape[1] > 2048 else 4,
            **dependent_launch(x.device),
        )
    return y


def silu_and_mul(x: torch.Tensor, launch: Launch = launch_now) -> torch.Tensor:
    """x (M, 2 * N), contiguous -> (M, N): silu(x[:, :N]) * x[:, N:], computed in float32."""
    m, n = x.shape[0], x.shape[1] // 2
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel():
        constants = {"COLUMNS": _COLUMNS, "num_warps": 4, **dependent_launch(x.device)}
        launch(_gate_kernel, (m, triton.cdiv(n, _COLUMNS)), x, y, n, **constants)
    return y


@triton.jit
def _add_norm_kernel(
    x_ptr,
    residual_ptr,
    gain_ptr,
    sums_ptr,
    y_ptr,
    k,
    x_stride,
    residual_stride,
    epsilon,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    there = column < k
    x = tl.load(x_ptr + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + row * residual_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row * k + column, x.to(sums_ptr.dtype.element_ty), mask=there)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / k + epsilon)
    y *= tl.load(gain_ptr + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * k + column, y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def _gate_kernel(x_ptr, y_ptr, n, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < n
    gate = tl.load(x_ptr + row * 2 * n + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * n + n + column, mask=there, other=0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * n + column, y.to(y_ptr.dtype.element_ty), mask=there)
