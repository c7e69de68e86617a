"""Scale search by output error in Triton: argmin of r'Hr over all 126 E4M3 codes, in one launch.

A program takes TILE rows of one column of blocks, which share one Hessian H of BLOCK_SIZE squared:

    r(s) = z - value(nearest q, s),    error(s) = r(s)' H r(s),    z = w/g

Every code is evaluated from 1 up to the first at which the whole tile rounds to zero; beyond it the
residual, and so the error, is that of zero. Neither clipping nor zeroing bounds r'Hr (H may be
singular), so nothing else is skipped. H is divided by its largest diagonal entry; where that is
zero, the squared error decides. The product H r runs in float32 ("ieee"), not in tf32.
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

_TILE = 64  # rows a program


def search_hessian(
    weight: torch.Tensor, global_scale: torch.Tensor, block_size: int, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the search over a batch of matrices.

    Args:
        weight: (E, N, K) float32, bfloat16 or float16, finite; any strides.
        global_scale: float32 (E,), positive and normal.
        block_size: 16 or 32; divides K.
        hessian: float32 (E, K/block_size, block_size, block_size), the last two contiguous;
            the first may be expanded (stride 0).

    Returns:
        Packed codes uint8 (E, N, K/2) and E4M3 codes of the block scales uint8 (E, N, K/block_size).
    """
    e, n, k = weight.shape
    codes = torch.empty(e, n, k // 8, dtype=torch.int32, device=weight.device)
    scales = torch.empty(e, n, k // block_size, dtype=torch.uint8, device=weight.device)
    if weight.numel():
        _search_hessian_kernel[(triton.cdiv(n, _TILE) * (k // block_size), e)](
            weight,
            global_scale,
            hessian,
            codes,
            scales,
            n,
            k // block_size,
            *weight.stride(),
            hessian.stride(0),
            hessian.stride(1),
            BLOCK_SIZE=block_size,
            TILE=_TILE,
        )
    return codes.view(torch.uint8), scales


@triton.jit
def _search_hessian_kernel(
    weight_ptr,
    global_scale_ptr,
    hessian_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    blocks_per_row,
    stride_e,
    stride_n,
    stride_k,
    hessian_stride_e,
    hessian_stride_j,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    j = (tl.program_id(0) % blocks_per_row).to(tl.int64)
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = row < rows
    element = tl.arange(0, BLOCK_SIZE)
    offsets = matrix * stride_e + row[:, None] * stride_n + (j * BLOCK_SIZE + element)[None, :] * stride_k
    w = tl.load(weight_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    g = tl.load(global_scale_ptr + matrix)
    hessian_start = hessian_ptr + matrix * hessian_stride_e + j * hessian_stride_j
    hessian = tl.load(hessian_start + element[:, None] * BLOCK_SIZE + element[None, :])
    z = tl.abs(tl.math.div_rn(w, tl.broadcast_to(g, w.shape)))
    code = _sweep(w, z, g, _normalized(hessian, BLOCK_SIZE))
    quants = e2m1_encode(w, z, e4m3_value(code)[:, None])
    words = pack_words(quants, TILE, BLOCK_SIZE)
    block = (matrix * rows + row) * blocks_per_row + j
    word = tl.arange(0, BLOCK_SIZE // 8)
    tl.store(codes_ptr + block[:, None] * (BLOCK_SIZE // 8) + word[None, :], words, mask=inside[:, None])
    tl.store(scales_ptr + block, code.to(tl.uint8), mask=inside)


@triton.jit
def _normalized(hessian, BLOCK_SIZE: tl.constexpr):
    """H over its largest diagonal entry, the identity where that is zero."""
    index = tl.arange(0, BLOCK_SIZE)
    diagonal = index[:, None] == index[None, :]
    peak = tl.max(tl.max(tl.where(diagonal, hessian, 0.0), axis=1), axis=0)
    safe = tl.where(peak > 0.0, peak, 1.0)
    return tl.where(peak > 0.0, hessian / safe, diagonal.to(tl.float32))


@triton.jit
def _sweep(w, z, g, hessian):
    """E4M3 code (TILE,) of the least r'Hr; w and z = |w/g| (TILE, BLOCK_SIZE), g a scalar."""
    unit, inverse = power_of_two_below(g)
    magnitude = tl.abs(w * inverse)
    last = tl.minimum(e4m3_snap(tl.max(tl.max(z, axis=1), axis=0) * 4.0) + 1, 126)
    best = tl.full((w.shape[0],), 1, tl.int32)
    best_error = tl.full((w.shape[0],), float("inf"), tl.float32)
    for i in range(0, last):
        code = best * 0 + (i + 1)
        scale = e4m3_value(code)[:, None]
        # The exact quotient: which way a tie rounds changes r'Hr.
        value = e2m1_round(tl.math.div_rn(z, tl.broadcast_to(scale, z.shape))) * scale
        residual = tl.fma(-value, tl.broadcast_to(unit, value.shape), magnitude)
        residual = tl.where(w < 0.0, -residual, residual)
        projected = tl.dot(residual, hessian, input_precision="ieee")
        error = tl.sum(projected * residual, axis=1)
        best = tl.where(error < best_error, code, best)
        best_error = tl.minimum(error, best_error)
    return best
