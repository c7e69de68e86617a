"""Dequantize in Triton, then the dense matmul: for many tokens, where the product costs more than the weight.

A program turns ROWS x BYTES packed codes into ROWS x 2*BYTES weights: value(code) * block_scale is
exact in float32, the global scale rounds it once, the output dtype once more. These are the bits
of `Nvfp4Tensor.dequantize`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.dense import multiply_dense
from qwantize_vllm.triton_format import decode_e2m1, decode_e4m3
from qwantize_vllm.triton_launch import launch_now

_ROWS, _BYTES = 4, 256


def matmul_dequantize(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype; needs the dense weight in x's dtype as scratch."""
    return multiply_dense(x, dequantize_triton(q, x.dtype), bias)


def dequantize_triton(q: Nvfp4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) of an unbatched Nvfp4Tensor in float32, bfloat16 or float16."""
    n, k = q.shape
    out = torch.empty(n, k, dtype=dtype, device=q.device)
    if out.numel():
        # One axis for all tiles: the second would end at 65,535 programs.
        launch_now(
            _dequantize_kernel,
            (triton.cdiv(n, _ROWS) * triton.cdiv(k // 2, _BYTES),),
            q.codes,
            q.block_scales.view(torch.uint8),
            q.global_scale,
            out,
            n,
            k // 2,
            q.codes.stride(0),
            q.block_scales.stride(0),
            ROWS=_ROWS,
            BYTES=_BYTES,
            BLOCK_BYTES=q.block_size // 2,
        )
    return out


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    global_scale_ptr,
    out_ptr,
    rows,
    row_bytes,
    codes_stride,
    scales_stride,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    tiles = tl.cdiv(row_bytes, BYTES)
    tile_row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile_row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tile * BYTES + tl.arange(0, BYTES)
    inside = (row < rows)[:, None] & (byte < row_bytes)[None, :]
    packed = tl.load(codes_ptr + row[:, None] * codes_stride + byte[None, :], mask=inside, other=0).to(tl.int32)
    scale_offsets = row[:, None] * scales_stride + (byte // BLOCK_BYTES)[None, :]
    scale = decode_e4m3(tl.load(scales_ptr + scale_offsets, mask=inside, other=0))
    g = tl.load(global_scale_ptr)
    pair = tl.join(decode_e2m1(packed) * scale * g, decode_e2m1(packed >> 4) * scale * g)
    k = tile * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    offsets = row[:, None] * (2 * row_bytes) + k[None, :]
    mask = (row < rows)[:, None] & (k < 2 * row_bytes)[None, :]
    tl.store(out_ptr + offsets, tl.reshape(pair, (ROWS, 2 * BYTES)).to(out_ptr.dtype.element_ty), mask=mask)
