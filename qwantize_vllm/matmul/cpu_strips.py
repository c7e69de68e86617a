"""Dequantizing a strip of rows into memory that is there already: by the LLVM kernel, or by PyTorch where it cannot be.

Either writes the bits of `Nvfp4Tensor.dequantize`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from qwantize_vllm.format import Nvfp4Tensor, dequantize_rows
from qwantize_vllm.matmul.cpu_fused import why_not_fused
from qwantize_vllm.matmul.cpu_tensors import adjacent, half_scales

if TYPE_CHECKING:
    from qwantize_vllm.matmul.llvm_run import Kernel


def dequantize_strip(q: Nvfp4Tensor, rows: slice, strip: torch.Tensor) -> None:
    """Write the rows of q to strip, (rows, K) and contiguous, in its dtype."""
    codes, scales = q.codes[rows], q.block_scales[rows]
    # float16 is rounded by PyTorch: LLVM calls a function for it on machines without such an instruction.
    if strip.is_cpu and strip.dtype != torch.float16 and why_not_fused() is None:
        _by_kernel(adjacent(codes), adjacent(scales), q.global_scale, q.block_size, strip)
    else:
        strip.copy_(dequantize_rows(codes, scales, q.global_scale, q.block_size))


def _by_kernel(
    codes: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor, block_size: int, strip: torch.Tensor
) -> None:
    from qwantize_vllm.matmul.llvm_strips import StripJob

    tensors = (codes, scales, half_scales(), global_scale, strip)
    numbers = (*codes.shape, codes.stride(0), scales.stride(0), 0)
    job = StripJob(*(tensor.data_ptr() for tensor in tensors), *numbers)
    _compiled(block_size, strip.dtype)(job, strip.numel())


@functools.cache
def _compiled(block_size: int, dtype: torch.dtype) -> Kernel:
    from qwantize_vllm.matmul.llvm_decode import decode_by_permutation, decode_by_shift
    from qwantize_vllm.matmul.llvm_run import Kernel, has
    from qwantize_vllm.matmul.llvm_strips import StripCode

    decode = decode_by_permutation if has("avx512f") else decode_by_shift
    return Kernel(str(StripCode(block_size, decode, dtype == torch.bfloat16).module), "strip")
