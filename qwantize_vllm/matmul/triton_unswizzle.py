"""The dense weight from the swizzled one, in Triton: for so many tokens that the product costs more than the weight.

value(code) * block_scale is exact in float32, the global scale rounds it once, the output dtype once more: the bits of
`Nvfp4Tensor.dequantize`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.matmul.dense import multiply_dense
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.matmul.triton_fragments import (
    TILE_COLUMNS,
    TILE_ROWS,
    block_values,
    load_scales,
    load_words,
    rescale,
)
from qwantize_vllm.triton_launch import launch_now

_STEPS = 4  # tiles a program


def matmul_unswizzled(x: torch.Tensor, weight: SwizzledNvfp4, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype; needs the dense weight in x's dtype as scratch."""
    return multiply_dense(x, dequantize_swizzled(weight, x.dtype), bias)


def dequantize_swizzled(weight: SwizzledNvfp4, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) in float32, bfloat16 or float16."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.words.device)
    groups, tiles = weight.words.shape[:2]
    launch_now(
        _unswizzle_kernel,
        (triton.cdiv(tiles, _STEPS), groups),
        weight.words,
        weight.scales,
        weight.global_scale,
        out,
        n,
        k,
        groups,
        tiles,
        weight.global_scale.dim(),
        BLOCK_SIZE=weight.block_size,
        STEPS=_STEPS,
        PTX=out.is_cuda and torch.version.hip is None and dtype != torch.float32,
        num_warps=4,
    )
    return out


@triton.jit
def _unswizzle_kernel(
    words_ptr,
    scales_ptr,
    global_scale_ptr,
    out_ptr,
    n,
    k,
    groups,
    tiles,
    global_scale_stride,
    BLOCK_SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    PTX: tl.constexpr,
):
    tile, group = tl.program_id(0) * STEPS, tl.program_id(1)
    words = load_words(words_ptr, group, groups, tile, tiles, 1, STEPS, False)
    scales = load_scales(scales_ptr, group, groups, tile, tiles, 1, STEPS)
    weight = block_values(words, scales, out_ptr.dtype.element_ty, BLOCK_SIZE, PTX).to(tl.float32)
    row = group * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile * TILE_COLUMNS + tl.arange(0, STEPS * TILE_COLUMNS)
    global_scale = tl.load(global_scale_ptr + row * global_scale_stride, mask=row < n, other=0.0)
    weight *= (global_scale * rescale(out_ptr.dtype.element_ty, PTX))[:, None]
    out = out_ptr + row.to(tl.int64)[:, None] * k + column[None, :]
    tl.store(out, weight.to(out_ptr.dtype.element_ty), mask=(row < n)[:, None] & (column < k)[None, :])
