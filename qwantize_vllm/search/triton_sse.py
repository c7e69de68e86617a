"""Naive and optimal scale search in Triton: one launch from weights to packed codes and E4M3 scales.

A thread takes one block. With g the global scale, z = |w/g|, and value(q, s) = q*s:

    naive    s = snap(max z / 6)
    optimal  s = argmin over all 126 E4M3 codes of  E(s) = sum (z - value(nearest q, s))^2

The optimal search evaluates the eight codes from `first` on, the smallest code with 7*s >= max z,
and then walks down. That is enough, and nobody needs to look at a bound on the way up:

    up    E(s) <= E(2s) where max z <= 7*s. The magnitudes {0, 1, 2, 3, 4, 6, 8, 12}*s of the scale
          2s are, up to 6*s, among those of s, and nothing up to 7*s is nearer to 8*s than to 6*s.
          Eight codes above a code is its double, so one octave holds an optimum. (Below code 16 only
          even codes have a half; there every code up to 15 is evaluated.)
    down  E(s) >= (max z - 6*s)^2 where that is clipped, and it is clipped harder at every smaller
          scale: the walk ends where this has reached the best error of every block of the tile.

The residual is one fused multiply-add of exact factors in units where g lies in [1, 2), see
`reference.py` for why that keeps float32 within 1e-5 of float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.search.triton_numbers import (
    divide_by_six,
    e2m1_encode,
    e2m1_round_small,
    e2m1_with_sign,
    e4m3_ceil,
    e4m3_snap,
    power_of_two_below,
    quotient,
    spread,
)
from qwantize_vllm.search.triton_tiles import LaunchShape, launch_shape, load_blocks, store_blocks, to_float32
from qwantize_vllm.triton_format import decode_e4m3
from qwantize_vllm.triton_launch import Launch, launch_now

# By the major version of the compute capability. A warp holds 32 blocks: it leaves its loops when the last of
# them does. Regenerate with `python scripts/tune_search.py`.
NAIVE_SHAPES = {9: LaunchShape(blocks=32, warps=1, tiles=4)}
OPTIMAL_SHAPES = {9: LaunchShape(blocks=32, warps=1, tiles=1)}

# CUDA's limit for the second axis of a grid.
_MATRICES_A_LAUNCH = 65535

# Magnitudes are kept in units of g' * 2^30, so that 1/scale * 2^-126 and its parts are normal numbers.
_2_POW_MINUS_30 = tl.constexpr(2.0**-30)
_2_POW_30 = tl.constexpr(2.0**30)
_2_POW_MINUS_96 = tl.constexpr(2.0**-96)
_2_POW_96 = tl.constexpr(2.0**96)
_SIX_SMALL = tl.constexpr(6 * 2.0**-126)


def search_sse(
    weight: torch.Tensor, global_scale: torch.Tensor, block_size: int, optimal: bool, launch: Launch = launch_now
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the search over a batch of matrices.

    Args:
        weight: (E, N, K) float32, bfloat16 or float16, finite; any strides.
        global_scale: float32 (E,), positive and normal.
        block_size: 16 or 32; divides K.
        optimal: search all 126 codes; otherwise snap(amax/6).
        launch: what else to do with the kernel than to run it.

    Returns:
        Packed codes uint8 (E, N, K/2) and E4M3 codes of the block scales uint8 (E, N, K/block_size).
    """
    e, n, k = weight.shape
    codes = torch.empty(e, n, k // 8, dtype=torch.int32, device=weight.device)
    scales = torch.empty(e, n, k // block_size, dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return codes.view(torch.uint8), scales
    blocks = n * (k // block_size)
    shape = launch_shape(OPTIMAL_SHAPES if optimal else NAIVE_SHAPES, weight.device, blocks)
    programs = triton.cdiv(blocks, shape.blocks * shape.tiles)
    for first in range(0, e, _MATRICES_A_LAUNCH):
        part = slice(first, first + _MATRICES_A_LAUNCH)
        launch(
            _search_sse_kernel,
            (programs, len(weight[part])),
            weight[part],
            global_scale[part],
            codes[part],
            scales[part],
            blocks,
            k // block_size,
            *weight.stride(),
            BLOCK_SIZE=block_size,
            TILE=shape.blocks,
            TILES=shape.tiles,
            OPTIMAL=optimal,
            WHOLE=weight.stride(2) == 1 and (weight.stride(1) == k or n == 1),
            num_warps=shape.warps,
            enable_fp_fusion=True,  # sums of squares are a third of the arithmetic; Triton 3.10 would not fuse them
        )
    return codes.view(torch.uint8), scales


@triton.jit
def _search_sse_kernel(
    weight_ptr,
    global_scale_ptr,
    codes_ptr,
    scales_ptr,
    blocks,
    blocks_per_row,
    stride_e,
    stride_n,
    stride_k,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    OPTIMAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """blocks: of one matrix; TILES: how many tiles a program takes, the next one on its way while one is searched;
    WHOLE: its rows follow each other without gaps."""
    matrix = tl.program_id(1).to(tl.int64)
    weight_ptr += matrix * stride_e
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    weights = _load(weight_ptr, block, blocks, blocks_per_row, stride_n, stride_k, BLOCK_SIZE, WHOLE)
    unit, inverse = power_of_two_below(tl.load(global_scale_ptr + matrix))
    unit = tl.full((TILE,), 0.0, tl.float32) + unit
    unit_inverse = tl.math.div_rn(1.0, unit)
    for _ in range(TILES):
        after = block + tl.num_programs(0) * TILE
        following = _load(weight_ptr, after, blocks, blocks_per_row, stride_n, stride_k, BLOCK_SIZE, WHOLE)
        w = to_float32(weights)
        magnitude = tl.abs(w * (inverse * _2_POW_MINUS_30))
        if OPTIMAL:
            code = _search(magnitude, unit, unit_inverse)
        else:
            code = e4m3_snap(divide_by_six(quotient(tl.max(magnitude, axis=1), unit, unit_inverse) * _2_POW_30))
        quants = _encode(w, magnitude, unit, unit_inverse, decode_e4m3(code))
        store_blocks(codes_ptr, scales_ptr, matrix * blocks + block, block < blocks, quants, code)
        weights, block = following, after


@triton.jit
def _load(weight_ptr, block, blocks, blocks_per_row, stride_n, stride_k, BLOCK_SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """The weights of blocks (TILE,), 0 for those that are not there."""
    if WHOLE:
        start = block.to(tl.int64) * BLOCK_SIZE
    else:
        row, column = block // blocks_per_row, block % blocks_per_row
        start = row.to(tl.int64) * stride_n + column.to(tl.int64) * (BLOCK_SIZE * stride_k)
    return load_blocks(weight_ptr, start, stride_k, block < blocks, BLOCK_SIZE)


@triton.jit
def _encode(w, magnitude, unit, unit_inverse, scale):
    """E2M1 codes (int32) of w at their block's scale: those of z = RN(w/g), ties to the even code.

    Rounding and code at once, in the numbers of e2m1_round_small, where y is right within seven units in the last
    place. Where one of the tile is within eight of a midpoint, z and z/scale are computed to the last bit instead.
    """
    y = tl.minimum(_small_quotient(magnitude, unit, scale), _SIX_SMALL).to(tl.int32, bitcast=True)
    # The code goes to bits 30 to 28, where only the sign is missing.
    rounded = ((y + 0x200000) << 6) | (w.to(tl.int32, bitcast=True) & -0x80000000)
    quants = (rounded.to(tl.uint32, bitcast=True) >> 28).to(tl.int32)
    # A midpoint has 21 zeros after a one in its last 22 bits: the least int32 when they are shifted to the top.
    if tl.min(tl.min((y + 8) << 10, axis=1), axis=0) < -0x80000000 + (16 << 10):
        z = quotient(magnitude, spread(unit, magnitude), spread(unit_inverse, magnitude))
        quants = e2m1_with_sign(e2m1_encode(z, spread(scale * _2_POW_MINUS_30, z)), w)
    return quants


@triton.jit
def _small_quotient(magnitude, unit, scale):
    """2^-126 * magnitude/(unit*scale), within some units in the last place."""
    return magnitude * spread((1.0 / (scale * unit)) * _2_POW_MINUS_96, magnitude)


@triton.jit
def _search(magnitude, unit, unit_inverse):
    """E4M3 code (TILE,) of the least squared error; magnitude (TILE, BLOCK_SIZE), unit and its inverse (TILE,)."""
    amax = tl.max(magnitude, axis=1)
    first = e4m3_ceil(amax * unit_inverse * _2_POW_30 * 0.14285715)
    # Only where not even the largest scale reaches amax does the first code clip.
    best, best_error = first, _error(magnitude, unit, first, CLIPS=True)
    code = first + 1
    for _ in tl.static_range(7):
        best, best_error = _better(magnitude, unit, code, code <= 126, best, best_error, CLIPS=False)
        code += 1
    while tl.min(code, axis=0) < 16:
        best, best_error = _better(magnitude, unit, code, code < 16, best, best_error, CLIPS=False)
        code += 1
    code = tl.maximum(first - 1, 1)
    going = (first > 1) & (_clipped(amax, unit, code) < best_error)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        best, best_error = _better(magnitude, unit, code, going, best, best_error, CLIPS=True)
        going = going & (code > 1)
        code = tl.maximum(code - 1, 1)
        going = going & (_clipped(amax, unit, code) < best_error)
    return best


@triton.jit
def _better(magnitude, unit, code, valid, best, best_error, CLIPS: tl.constexpr):
    error = _error(magnitude, unit, code, CLIPS)
    better = valid & (error < best_error)
    return tl.where(better, code, best), tl.where(better, error, best_error)


@triton.jit
def _error(magnitude, unit, code, CLIPS: tl.constexpr):
    """Squared error (TILE,) of each block at its scale code; CLIPS: magnitudes may exceed 7 scales.

    1/(scale*unit) may be off in its last places: a magnitude so near a midpoint is as good on either side.
    """
    scale = decode_e4m3(code)
    y = _small_quotient(magnitude, unit, scale)
    if CLIPS:
        y = tl.minimum(y, _SIX_SMALL)
    value = e2m1_round_small(y) * spread(scale * _2_POW_96, magnitude)
    residual = tl.fma(value, spread(-unit, magnitude), magnitude)
    return tl.sum(residual * residual, axis=1)


@triton.jit
def _clipped(amax, unit, code):
    """Squared clipping error of the largest element at a scale code."""
    excess = tl.maximum(amax - decode_e4m3(code) * unit * 6.0 * _2_POW_MINUS_30, 0.0)
    return excess * excess
