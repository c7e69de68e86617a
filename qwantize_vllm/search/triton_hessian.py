"""Scale search by output error in Triton: argmin of r'Hr over all 126 E4M3 codes.

A thread takes one block of a row; the blocks of a program are in one column and share one Hessian H:

    r(s) = z - value(nearest q, s),    error(s) = r(s)' H r(s),    z = w/g

`triton_hessian_form.py` finds weights d with r'Hr >= sum d_i r_i^2. The search starts at the smallest
code with 6.9*s >= max|z|, where everything is below 7*s and still rounds to 6*s at most, and walks up,
then down, until such a bound reaches the best error of every block of the tile. All are parts of
sum d_i r_i^2:

    up    sum d_i r_i^2 over |z_i| < s/2: r_i is the distance to 0 or to s/2, whichever is less, and s/2
          only moves away; and at the latest where all of the block rounds to zero
    down  sum d_i (|z_i| - 6*s)^2 over what is clipped, which is clipped harder at every smaller scale

Where H is (nearly) singular, d = 0: all codes are tried, in float64, because r'Hr may be left of a cancellation.
Which way a tie rounds changes r'Hr, so the quotients that are rounded are those of z = RN(w/g), exact
where they are ties. For blocks of 16, H stays in registers as 136 coefficients, which leaves a warp alone with
its arithmetic; for blocks of 32, r'Hr is a float32 `tl.dot`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.search.triton_hessian_form import prepare_hessian
from qwantize_vllm.search.triton_numbers import (
    e2m1_encode,
    e2m1_round,
    e2m1_with_sign,
    e4m3_ceil,
    power_of_two_below,
    quotient,
    spread,
)
from qwantize_vllm.search.triton_tiles import (
    LaunchShape,
    columns,
    launch_shape,
    load_blocks,
    store_blocks,
    to_float32,
)
from qwantize_vllm.triton_format import decode_e4m3
from qwantize_vllm.triton_launch import launch_now

# By the major version of the compute capability. A warp holds 32 blocks: it leaves its loops when the last of
# them does; more tiles share the loading of H. Regenerate with `python scripts/tune_search.py`.
HESSIAN_SHAPES = {9: LaunchShape(blocks=32, warps=1, tiles=4)}

# A |z| above it is beyond 6*448 already; below 7*448 it still rounds to 6 at the largest scale.
_LARGEST_Z = tl.constexpr(3100.0)


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
        shared = e == 1 or hessian.stride(0) == 0
        form, bound = prepare_hessian(hessian[:1] if shared else hessian)
        shape = launch_shape(HESSIAN_SHAPES, weight.device, n)
        programs = triton.cdiv(n, shape.blocks * shape.tiles)
        launch_now(
            _search_hessian_kernel,
            (e * programs * (k // block_size),),
            weight,
            global_scale,
            form,
            bound,
            codes,
            scales,
            n,
            programs,
            k // block_size,
            *weight.stride(),
            SHARED=shared,
            BLOCK_SIZE=block_size,
            TILE=shape.blocks,
            TILES=shape.tiles,
            num_warps=shape.warps,
            enable_fp_fusion=True,  # sums of squares are a third of the arithmetic; Triton 3.10 would not fuse them
        )
    return codes.view(torch.uint8), scales


@triton.jit
def _search_hessian_kernel(
    weight_ptr,
    global_scale_ptr,
    form_ptr,
    bound_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    programs,
    blocks_per_row,
    stride_e,
    stride_n,
    stride_k,
    SHARED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """programs: how many share a column of blocks; neighbouring ones read neighbouring columns of the same rows."""
    j = (tl.program_id(0) % blocks_per_row).to(tl.int64)
    program = tl.program_id(0) // blocks_per_row
    matrix = (program // programs).to(tl.int64)
    row = (program % programs).to(tl.int64) * (TILE * TILES) + tl.arange(0, TILE)
    unit, inverse = power_of_two_below(tl.load(global_scale_ptr + matrix))
    at = j if SHARED else matrix * blocks_per_row + j
    form_ptr += at * BLOCK_SIZE * BLOCK_SIZE
    bound = tl.load(bound_ptr + at * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE))
    weight_ptr += matrix * stride_e + j * (BLOCK_SIZE * stride_k)
    result = matrix * rows * blocks_per_row + j
    if tl.max(bound, axis=0) > 0.0:
        form = _load_form(form_ptr, BLOCK_SIZE)
        for _ in range(TILES):
            w, scaled, z = _load(weight_ptr, row, rows, stride_n, stride_k, unit, inverse, BLOCK_SIZE)
            code = _search(scaled, z, unit, form, bound, SINGULAR=False)
            _store(codes_ptr, scales_ptr, result + row * blocks_per_row, row < rows, w, z, code)
            row += TILE
    else:
        for _ in range(TILES):
            w, scaled, z = _load(weight_ptr, row, rows, stride_n, stride_k, unit, inverse, BLOCK_SIZE)
            code = _search(scaled, z, unit, form_ptr, bound, SINGULAR=True)
            _store(codes_ptr, scales_ptr, result + row * blocks_per_row, row < rows, w, z, code)
            row += TILE


@triton.jit
def _load(weight_ptr, row, rows, stride_n, stride_k, unit, inverse, BLOCK_SIZE: tl.constexpr):
    """Of one block of each row: its weights w, z*unit and z."""
    w = to_float32(load_blocks(weight_ptr, row * stride_n, stride_k, row < rows, BLOCK_SIZE))
    scaled = w * inverse
    z = quotient(scaled, spread(unit + row * 0.0, w), spread(tl.math.div_rn(1.0, unit + row * 0.0), w))
    return w, scaled, tl.minimum(tl.maximum(z, -_LARGEST_Z), _LARGEST_Z)


@triton.jit
def _store(codes_ptr, scales_ptr, block, inside, w, z, code):
    quants = e2m1_with_sign(e2m1_encode(tl.abs(z), spread(decode_e4m3(code), z)), w)
    store_blocks(codes_ptr, scales_ptr, block, inside, quants, code)


@triton.jit
def _search(scaled, z, unit, form, bound, SINGULAR: tl.constexpr):
    """E4M3 code (TILE,) of the least r'Hr; scaled = z*unit and z (TILE, BLOCK_SIZE), bound (BLOCK_SIZE,).

    form: what _load_form gives, or a pointer to it where H is SINGULAR.
    """
    bound = tl.broadcast_to(bound[None, :], z.shape)
    amax = tl.max(tl.abs(z), axis=1)
    first = e4m3_ceil(amax * (1 / 6.9))
    code, best = first, first
    best_error = tl.full(first.shape, float("inf"), tl.float64 if SINGULAR else tl.float32)
    going = code > 0
    while tl.max(going.to(tl.int32), axis=0) > 0:
        value, y = _nearest(z, code, CLIPS=False)
        best, best_error = _better(scaled, value, unit, form, going, code, best, best_error, SINGULAR)
        # Where all of the block rounds to zero, larger scales change nothing.
        going = going & (amax > 0.25 * decode_e4m3(code)) & (code < 126)
        if not SINGULAR:
            residual = tl.fma(value, tl.full(z.shape, 0.0, tl.float32) - unit, scaled)
            near_zero = tl.where(tl.abs(y) < 0.5, residual, 0.0)
            going = going & (tl.sum(bound * near_zero * near_zero, axis=1) < best_error)
        code += 1
    code = first
    going = code > 1
    if not SINGULAR:
        going = going & _may_win_below(scaled, unit, code, bound, best_error)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        code = tl.maximum(code - 1, 1)
        value, _ = _nearest(z, code, CLIPS=True)
        best, best_error = _better(scaled, value, unit, form, going, code, best, best_error, SINGULAR)
        going = going & (code > 1)
        if not SINGULAR:
            going = going & _may_win_below(scaled, unit, code, bound, best_error)
    return best


@triton.jit
def _may_win_below(scaled, unit, code, bound, best_error):
    """Whether the code below a code can still win: the bound by its clipping is less than the best error."""
    limit = 6.0 * decode_e4m3(tl.maximum(code - 1, 1)) * unit
    excess = tl.maximum(tl.abs(scaled) - spread(limit, scaled), 0.0)
    return tl.sum(bound * excess * excess, axis=1) < best_error


@triton.jit
def _better(scaled, value, unit, form, valid, code, best, best_error, SINGULAR: tl.constexpr):
    if SINGULAR:
        error = _quadratic_float64(scaled.to(tl.float64) - value.to(tl.float64) * unit.to(tl.float64), form)
    else:
        error = _quadratic(tl.fma(value, tl.full(value.shape, 0.0, tl.float32) - unit, scaled), form)
    better = valid & (error < best_error)
    return tl.where(better, code, best), tl.where(better, error, best_error)


@triton.jit
def _nearest(z, code, CLIPS: tl.constexpr):
    """(nearest value, z/scale), both (TILE, BLOCK_SIZE); CLIPS: |z| may exceed 7 scales.

    The inverse of the scale has two parts, so z/scale is a midpoint of E2M1 only if z is the midpoint * scale.
    """
    scale = decode_e4m3(code)
    inverse = 1.0 / scale
    rest = tl.fma(inverse, -scale, tl.full(scale.shape, 1.0, tl.float32)) * inverse
    y = tl.fma(z, spread(inverse, z), z * spread(rest, z))
    if CLIPS:
        y = tl.minimum(tl.maximum(y, -6.0), 6.0)
    return e2m1_round(y) * spread(scale, z), y


@triton.jit
def _load_form(form_ptr, BLOCK_SIZE: tl.constexpr):
    """The argument `form` of _quadratic: for blocks of 16 the coefficients of r_i r_j, i <= j, row by row, a tuple of
    scalars; for blocks of 32, H."""
    if BLOCK_SIZE == 16:
        form = ()
        for i in tl.static_range(16):
            form = form + (tl.load(form_ptr + i * 16 + i),)
            for j in tl.static_range(i + 1, 16):
                form = form + (2.0 * tl.load(form_ptr + i * 16 + j),)
        return form
    else:
        index = tl.arange(0, BLOCK_SIZE)
        return tl.load(form_ptr + index[:, None] * BLOCK_SIZE + index[None, :])


@triton.jit
def _quadratic_float64(residual, form_ptr):
    """r'Hr (TILE,) of float64 residuals (TILE, BLOCK_SIZE)."""
    index = tl.arange(0, residual.shape[1])
    total = tl.sum(residual, axis=1) * 0.0
    for i in range(residual.shape[1]):
        row = tl.load(form_ptr + i * residual.shape[1] + index).to(tl.float64)
        element = tl.sum(tl.where(index[None, :] == i, residual, 0.0), axis=1)
        total += element * tl.sum(residual * row[None, :], axis=1)
    return total


@triton.jit
def _quadratic(residual, form):
    """r'Hr (TILE,), in float32."""
    if residual.shape[1] == 16:
        r = columns(residual)
        total = r[0] * 0.0
        for i in tl.static_range(16):
            # The coefficient of r_i r_j, j >= i, is number 16*i - i*(i+1)/2 + j.
            product = form[i * 16 - i * (i - 1) // 2] * r[i]
            for j in tl.static_range(i + 1, 16):
                product += form[i * 16 - i * (i + 1) // 2 + j] * r[j]
            total += product * r[i]
        return total
    else:
        return tl.sum(tl.dot(residual, form, input_precision="ieee") * residual, axis=1)
