"""Dequantize and multiply in one Triton kernel: for few tokens, where reading the weight is the cost.

y = x W' is computed as W x', the weight on the left, so that even a single token fills the rows of
a tensor-core product. A byte holds an even k and the odd k after it; nothing is interleaved:

    y[n, m] = sum over bytes b of  low(b) * x[m, 2b]  +  high(b) * x[m, 2b + 1]

is two products over half of K each. value * block_scale is exact in x's dtype (six significant bits),
products accumulate in float32, and the global scale and the bias enter in float32 at the end.

So that few rows still fill the GPU, K is cut into SPLITS slices; each writes its float32 partial sums
and a second kernel adds them in order: the result does not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.gpu import multiprocessors
from qwantize_vllm.triton_format import decode_e2m1, decode_e4m3
from qwantize_vllm.triton_launch import launch_now

_TILE_N, _TILE_K = 64, 256
_REDUCE_TILE = 1024
_PROGRAMS_PER_MULTIPROCESSOR = 4


def matmul_fused(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) bfloat16 or float16 -> (M, N) in x's dtype; float32 scratch of SPLITS * M * N."""
    m, (n, k) = x.shape[0], q.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile_m = min(64, max(16, triton.next_power_of_2(m)))
    tiles = triton.cdiv(n, _TILE_N) * triton.cdiv(m, tile_m)
    slices = triton.cdiv(k, _TILE_K)
    splits = max(1, min(slices, _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device) // tiles))
    partial = torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    launch_now(
        _fused_kernel,
        (triton.cdiv(n, _TILE_N), triton.cdiv(m, tile_m), splits),
        x,
        q.codes,
        q.block_scales.view(torch.uint8),
        partial,
        m,
        n,
        k,
        triton.cdiv(slices, splits),
        *x.stride(),
        q.codes.stride(0),
        q.block_scales.stride(0),
        BLOCK_SIZE=q.block_size,
        # The interpreter multiplies the bit patterns of bfloat16; there the product is taken in float32.
        DOT_DTYPE=None if x.is_cuda else tl.float32,
        TILE_M=tile_m,
        TILE_N=_TILE_N,
        TILE_K=_TILE_K,
        num_warps=4,
        num_stages=3,
    )
    given = (partial, q.global_scale, bias, y, m * n, n, splits)
    constants = {"HAS_BIAS": bias is not None, "TILE": _REDUCE_TILE}
    launch_now(_reduce_kernel, (triton.cdiv(m * n, _REDUCE_TILE),), *given, **constants)
    return y


@triton.jit
def _fused_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    partial_ptr,
    m,
    n,
    k,
    slices_per_split,
    x_stride_m,
    x_stride_k,
    codes_stride,
    scales_stride,
    BLOCK_SIZE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    BYTES: tl.constexpr = TILE_K // 2
    row = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    token = tl.program_id(1).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    split = tl.program_id(2).to(tl.int64)
    dtype = x_ptr.dtype.element_ty if DOT_DTYPE is None else DOT_DTYPE
    total = tl.zeros((TILE_N, TILE_M), dtype=tl.float32)
    for i in range(0, slices_per_split):
        start = (split * slices_per_split + i) * TILE_K
        byte = start // 2 + tl.arange(0, BYTES)
        inside = (row < n)[:, None] & (byte < k // 2)[None, :]
        packed = tl.load(codes_ptr + row[:, None] * codes_stride + byte[None, :], mask=inside, other=0).to(tl.int32)
        scale = _load_scales(scales_ptr, row, start, n, k, scales_stride, BLOCK_SIZE, TILE_N, TILE_K)
        even = tl.arange(0, BYTES) * 2 + start
        x_mask = (even < k)[:, None] & (token < m)[None, :]
        x_even_ptr = x_ptr + even[:, None] * x_stride_k + token[None, :] * x_stride_m
        x_even = tl.load(x_even_ptr, mask=x_mask, other=0.0).to(dtype)
        x_odd = tl.load(x_even_ptr + x_stride_k, mask=x_mask, other=0.0).to(dtype)
        total = tl.dot((decode_e2m1(packed) * scale).to(dtype), x_even, total)
        total = tl.dot((decode_e2m1(packed >> 4) * scale).to(dtype), x_odd, total)
    out = partial_ptr + (split * m + token[None, :]) * n + row[:, None]
    tl.store(out, total, mask=(row < n)[:, None] & (token < m)[None, :])


@triton.jit
def _load_scales(
    scales_ptr,
    row,
    start,
    n,
    k,
    scales_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """float32 (TILE_N, TILE_K / 2): the block scale of every byte of a tile."""
    BLOCKS: tl.constexpr = TILE_K // BLOCK_SIZE
    block = start // BLOCK_SIZE + tl.arange(0, BLOCKS)
    inside = (row < n)[:, None] & (block < k // BLOCK_SIZE)[None, :]
    scale = decode_e4m3(tl.load(scales_ptr + row[:, None] * scales_stride + block[None, :], mask=inside, other=0))
    spread = tl.broadcast_to(scale[:, :, None], (TILE_N, BLOCKS, BLOCK_SIZE // 2))
    return tl.reshape(spread, (TILE_N, TILE_K // 2))


@triton.jit
def _reduce_kernel(
    partial_ptr, global_scale_ptr, bias_ptr, y_ptr, size, n, splits, HAS_BIAS: tl.constexpr, TILE: tl.constexpr
):
    """y = (sum of the partial sums, in order) * global_scale + bias."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < size
    total = tl.zeros((TILE,), dtype=tl.float32)
    partial_ptr += index
    for _ in range(0, splits):
        total += tl.load(partial_ptr, mask=inside, other=0.0)
        partial_ptr += size  # not a product with size: that may be an int32, and where it is 1 it has no type
    total *= tl.load(global_scale_ptr)
    if HAS_BIAS:
        total += tl.load(bias_ptr + index % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, total.to(y_ptr.dtype.element_ty), mask=inside)
