"""What the search by output error needs to know of each block Hessian H, in one launch.

    form    H times a power of two that brings its largest diagonal entry into [1, 2) (the identity where
            that is zero), symmetric, rows and columns in the order of `load_blocks`
    weight  d with r'Hr >= sum d_i r_i^2 for every r: a diagonal part of H that no cancellation touches

d is lambda * diag(H). H - lambda*diag(H) is positive semidefinite where Gaussian elimination meets only positive
pivots. Of 16 values of lambda from 1/64 to 2^-0.375, eliminated side by side, the largest such one is taken; where
there is none, H is singular, nearly so, or indefinite, and d = 0. The elimination runs in float64 on lambda + 1e-9,
which exceeds its rounding error by far: each lambda is proven.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.triton_launch import launch_now

_TRIED = tl.constexpr(16)  # values of lambda, their exponents of 2 evenly from -6 to 0


def prepare_hessian(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """form (E, J, block, block) and weight (E, J, block), float32.

    Args:
        hessian: float32 (E, J, block, block), the last two contiguous.
    """
    e, j, size, _ = hessian.shape
    form, weight = torch.empty_like(hessian, memory_format=torch.contiguous_format), hessian.new_empty(e, j, size)
    if e * j:
        given = (hessian, form, weight, j, *hessian.stride()[:2])
        launch_now(_prepare_hessian_kernel, (e * j,), *given, SIZE=size, num_warps=size // 2)
    return form, weight


@triton.jit
def _prepare_hessian_kernel(hessian_ptr, form_ptr, weight_ptr, blocks, stride_e, stride_j, SIZE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    hessian_ptr += (block // blocks) * stride_e + (block % blocks) * stride_j
    index = tl.arange(0, SIZE)
    # load_blocks puts element 8*j + i at i*SIZE/8 + j.
    element = index % (SIZE // 8) * 8 + index // (SIZE // 8)
    hessian = tl.load(hessian_ptr + element[:, None] * SIZE + element[None, :]).to(tl.float64)
    mirrored = tl.load(hessian_ptr + element[None, :] * SIZE + element[:, None]).to(tl.float64)
    on_diagonal = index[:, None] == index[None, :]
    hessian = _normalized((hessian + mirrored) * 0.5, on_diagonal)
    tl.store(form_ptr + block * SIZE * SIZE + index[:, None] * SIZE + index[None, :], hessian.to(tl.float32))
    diagonal = tl.sum(tl.where(on_diagonal, hessian, 0.0), axis=1)
    # A row whose diagonal is zero must be zero; its weight then is zero, whatever lambda.
    sound = tl.min(tl.min(tl.where((diagonal[:, None] > 0.0) | (hessian == 0.0), 1.0, 0.0), axis=1), axis=0)
    largest = _largest_lambda(hessian_ptr, SIZE) * sound
    # The factor leaves room for the float32 rounding of what it bounds.
    tl.store(weight_ptr + block * SIZE + index, (largest * 0.999 * diagonal).to(tl.float32))


@triton.jit
def _normalized(hessian, on_diagonal):
    peak = tl.max(tl.max(tl.where(on_diagonal, hessian, 0.0), axis=1), axis=0)
    exponent = peak.to(tl.int64, bitcast=True) >> 52
    scale = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    return tl.where(peak > 0.0, hessian * scale, on_diagonal.to(tl.float64))


@triton.jit
def _largest_lambda(hessian_ptr, SIZE: tl.constexpr):
    """The largest lambda that is tried and proven, or 0."""
    tried = tl.exp2((tl.arange(0, _TRIED) - _TRIED).to(tl.float32) * (6.0 / _TRIED)).to(tl.float64)
    proven = _definite(_columns(hessian_ptr, tried + 1e-9, SIZE), SIZE)
    return tl.max(tl.where(proven, tried, 0.0), axis=0)


@triton.jit
def _columns(hessian_ptr, shift, SIZE: tl.constexpr):
    """The columns of D (H - shift * diag(H)) D, each (shifts, SIZE), where D makes the diagonal of H about 1."""
    row = tl.arange(0, SIZE)
    root = _inverse_root(hessian_ptr + row * (SIZE + 1))
    columns = ()
    for column in tl.static_range(SIZE):
        entry = tl.load(hessian_ptr + row * SIZE + column).to(tl.float64)
        mirrored = tl.load(hessian_ptr + column * SIZE + row).to(tl.float64)
        entry = (entry + mirrored) * 0.5 * root * _inverse_root(hessian_ptr + column * (SIZE + 1))
        entry = tl.where((row == column) & (entry == 0.0), 1.0, entry)
        columns = columns + (entry[None, :] * (1.0 - tl.where((row == column)[None, :], shift[:, None], 0.0)),)
    return columns


@triton.jit
def _inverse_root(diagonal_ptr):
    diagonal = tl.load(diagonal_ptr)
    return tl.rsqrt(tl.where(diagonal > 0.0, diagonal, 1.0)).to(tl.float64)


@triton.jit
def _definite(columns, SIZE: tl.constexpr):
    """Whether Gaussian elimination of each symmetric matrix meets only positive pivots."""
    passed = tl.max(columns[0], axis=1) > -1.0
    for step in range(SIZE):
        pivot = tl.max(_row(columns[0], step), axis=1)
        passed = passed & (pivot > 0.0)
        factor = columns[0] * tl.where(passed, 1.0 / pivot, 0.0)[:, None]
        rest = ()
        for column in tl.static_range(1, SIZE):
            # Columns that are done with follow the last one; what they hold does not matter.
            rest = rest + (columns[column] - factor * _row(columns[0], tl.minimum(step + column, SIZE - 1)),)
        columns = rest + (columns[0],)
    return passed


@triton.jit
def _row(column, row):
    """An entry of each matrix's column, in place of all of them."""
    return tl.gather(column, tl.full(column.shape, 0, tl.int32) + row, axis=1)
