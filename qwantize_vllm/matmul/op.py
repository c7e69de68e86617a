"""The matmul as one custom op: torch.compile and CUDA graphs take it whole, whichever backend runs inside."""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.backends import BACKENDS, choose_backend, run_swizzled
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4


@torch.library.custom_op("qwantize::matmul_nvfp4", mutates_args=())
def matmul_op(
    x: torch.Tensor,
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: int,
    backend: str,
) -> torch.Tensor:
    """x (..., K) times the NVFP4 weight (N, K) -> (..., N); see `matmul_nvfp4`, which checks the arguments."""
    q = Nvfp4Tensor(codes, block_scales, global_scale, block_size)
    flat = x.reshape(-1, x.shape[-1])
    name = choose_backend(flat) if backend == "auto" else backend
    if reason := BACKENDS[name].why_not(flat):
        raise ValueError(f"backend {name!r} {reason}")
    return BACKENDS[name].run(flat, q, bias).view(*x.shape[:-1], q.shape[0])


@matmul_op.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, *rest: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


# `arrived` is not declared as mutated: it is scratch, zeros before and after.
@torch.library.custom_op("qwantize::matmul_swizzled", mutates_args=())
def matmul_swizzled_op(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    arrived: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    block_size: int,
    backend: str,
) -> torch.Tensor:
    """x (..., K) times the swizzled NVFP4 weight (N, K) -> (..., N); see `matmul_nvfp4`, which checks the arguments."""
    weight = SwizzledNvfp4(words, scales, global_scale, arrived, (n, x.shape[-1]), block_size)
    flat = x.reshape(-1, x.shape[-1])
    return run_swizzled(flat, weight, bias, backend).view(*x.shape[:-1], n)


@matmul_swizzled_op.register_fake
def _(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    arrived: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    *rest: object,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], n)
