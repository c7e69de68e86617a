"""Naive and optimal scale search in Triton: one launch from weights to packed codes and E4M3 scales.

A program takes TILE blocks. With g the global scale, z = w/g, and value(q, s) = q*s:

    naive    s = snap(max|z| / 6)
    optimal  s = argmin over all 126 E4M3 codes of  sum (z - value(nearest q, s))^2

The optimal search starts at the naive code and walks up, then down, until a bound that can only
grow has reached the best error of every block of the tile:

    up    sum z^2 over what rounds to zero    (it still rounds to zero at every larger scale)
    down  (max|z| - 6 s)^2 where positive     (it is clipped harder at every smaller scale)

Both are parts of the error itself, so no scale beyond them can win. The residual is one fused
multiply-add of exact factors in units where g lies in [1, 2), see `reference.py` for why that
keeps float32 within 1e-5 of float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.search.triton_numbers import (
    e2m1_encode,
    e2m1_round,
    e4m3_snap,
    e4m3_value,
    pack_words,
    power_of_two_below,
)

_TILE = 128  # blocks a program


def search_sse(
    weight: torch.Tensor, global_scale: torch.Tensor, block_size: int, optimal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the search over a batch of matrices.

    Args:
        weight: (E, N, K) float32, bfloat16 or float16, finite; any strides.
        global_scale: float32 (E,), positive and normal.
        block_size: 16 or 32; divides K.
        optimal: search all 126 codes; otherwise snap(amax/6).

    Returns:
        Packed codes uint8 (E, N, K/2) and E4M3 codes of the block scales uint8 (E, N, K/block_size).
    """
    e, n, k = weight.shape
    blocks = weight.numel() // block_size
    codes = torch.empty(e, n, k // 8, dtype=torch.int32, device=weight.device)
    scales = torch.empty(e, n, k // block_size, dtype=torch.uint8, device=weight.device)
    if blocks:
        _search_sse_kernel[(triton.cdiv(blocks, _TILE),)](
            weight,
            global_scale,
            codes,
            scales,
            blocks,
            n,
            k // block_size,
            *weight.stride(),
            BLOCK_SIZE=block_size,
            TILE=_TILE,
            OPTIMAL=optimal,
        )
    return codes.view(torch.uint8), scales


@triton.jit
def _search_sse_kernel(
    weight_ptr,
    global_scale_ptr,
    codes_ptr,
    scales_ptr,
    num_blocks,
    rows,
    blocks_per_row,
    stride_e,
    stride_n,
    stride_k,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OPTIMAL: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = block < num_blocks
    row, column = block // blocks_per_row, block % blocks_per_row
    element = tl.arange(0, BLOCK_SIZE)
    start = (row // rows) * stride_e + (row % rows) * stride_n + column * (BLOCK_SIZE * stride_k)
    offsets = start[:, None] + (element * stride_k)[None, :]
    w = tl.load(weight_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    g = tl.load(global_scale_ptr + row // rows, mask=inside, other=1.0)
    z = tl.abs(tl.math.div_rn(w, g[:, None]))
    code = e4m3_snap(tl.math.div_rn(tl.max(z, axis=1), 6.0))
    if OPTIMAL:
        code = _walk(w, g, code)
    quants = e2m1_encode(w, z, e4m3_value(code)[:, None])
    words = pack_words(quants, TILE, BLOCK_SIZE)
    word = tl.arange(0, BLOCK_SIZE // 8)
    tl.store(codes_ptr + block[:, None] * (BLOCK_SIZE // 8) + word[None, :], words, mask=inside[:, None])
    tl.store(scales_ptr + block, code.to(tl.uint8), mask=inside)


@triton.jit
def _walk(w, g, start):
    """E4M3 code of the least squared error; w (TILE, BLOCK_SIZE), g and start (TILE,)."""
    unit, inverse = power_of_two_below(g)
    magnitude = tl.abs(w * inverse[:, None])
    best = start
    best_error, zeroed = _error(magnitude, unit, start)
    code = start
    going = (zeroed < best_error) & (code < 126)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        code = tl.where(going, code + 1, code)
        error, zeroed = _error(magnitude, unit, code)
        better = going & (error < best_error)
        best_error = tl.where(better, error, best_error)
        best = tl.where(better, code, best)
        going = going & (zeroed < best_error) & (code < 126)
    amax = tl.max(magnitude, axis=1)
    code = start - 1
    going = (code >= 1) & (_clipped(amax, unit, code) < best_error)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        error, _ = _error(magnitude, unit, tl.maximum(code, 1))
        better = going & (error < best_error)
        best_error = tl.where(better, error, best_error)
        best = tl.where(better, code, best)
        code = tl.where(going, code - 1, code)
        going = going & (code >= 1) & (_clipped(amax, unit, code) < best_error)
    return best


@triton.jit
def _error(magnitude, unit, code):
    """(squared error, energy of what rounds to zero) of each block at its scale code, both (TILE,)."""
    scale = e4m3_value(code)
    inverse = 1.0 / (scale * unit)
    value = e2m1_round(magnitude * inverse[:, None])
    residual = tl.fma(-(value * scale[:, None]), tl.broadcast_to(unit[:, None], value.shape), magnitude)
    zeroed = tl.where(value == 0.0, magnitude * magnitude, 0.0)
    return tl.sum(residual * residual, axis=1), tl.sum(zeroed, axis=1)


@triton.jit
def _clipped(amax, unit, code):
    """Squared clipping error of the largest element at a scale code (codes below 1 give that of code 1)."""
    excess = tl.maximum(amax - 6.0 * e4m3_value(tl.maximum(code, 1)) * unit, 0.0)
    return excess * excess
