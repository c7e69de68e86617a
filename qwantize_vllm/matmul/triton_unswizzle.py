"""The dense weight from the swizzled one, in Triton: for so many tokens that the product costs more than the weight.

value(code) * block_scale is exact in float32, the global scale rounds it once, the output dtype once more: the bits of
`Nvfp4Tensor.dequantize`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.matmul.triton_fragments import (
    TILE_COLUMNS,
    TILE_DEPTH,
    TILE_ROWS,
    as_matrix,
    planes,
    scale_offsets,
    scale_value,
    spread,
    word_offsets,
)


def matmul_unswizzled(x: torch.Tensor, weight: SwizzledNvfp4, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype; needs the dense weight in x's dtype as scratch."""
    return torch.nn.functional.linear(x, dequantize_swizzled(weight, x.dtype), bias)


def dequantize_swizzled(weight: SwizzledNvfp4, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) in float32, bfloat16 or float16."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.words.device)
    groups, tiles = weight.words.shape[:2]
    _unswizzle_kernel[(tiles, groups)](
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
):
    tile, group = tl.program_id(0), tl.program_id(1)
    words = tl.load(words_ptr + word_offsets(group, groups, tiles, 1) + tile * (TILE_ROWS * TILE_DEPTH))
    scale_ptr = scales_ptr + scale_offsets(group, groups, tiles, 1, BLOCK_SIZE)
    scales = tl.load(scale_ptr + tile * (TILE_ROWS * TILE_DEPTH // BLOCK_SIZE))
    row = group * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tile * TILE_COLUMNS + tl.arange(0, TILE_DEPTH)
    global_scale = tl.load(global_scale_ptr + row * global_scale_stride, mask=row < n, other=0.0)[:, None]
    out = out_ptr + row.to(tl.int64)[:, None] * k + column[None, :]
    values = planes(as_matrix(words), tl.float32, False)
    for plane in tl.static_range(4):
        scale = spread(scale_value((scales >> (8 * plane)) & 0xFF), BLOCK_SIZE)
        inside = (row < n)[:, None] & (column + plane * TILE_DEPTH < k)[None, :]
        weight = values[plane] * scale * global_scale
        tl.store(out + plane * TILE_DEPTH, weight.to(out_ptr.dtype.element_ty), mask=inside)
