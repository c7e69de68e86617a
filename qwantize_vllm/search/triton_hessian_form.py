"""What the search by output error needs to know of each block Hessian H, in one launch.

    form    H times a power of two that brings its largest diagonal entry into [1, 2) (the identity where
            that is zero), symmetric, rows and columns in the order of `load_blocks`
    weight  d with r'Hr >= sum d_i r_i^2 for every r: a diagonal part of H that no cancellation touches

d is lambda * diag(H). H - lambda*diag(H) is positive semidefinite where Gaussian elimination of
C - lambda*I, C the H with unit diagonal, meets only positive pivots. A bisection finds the largest such
lambda in [1/64, 1]; where there is none, H is singular, nearly so, or indefinite, and d = 0. The elimination
runs in float64 on lambda + 1e-9, which exceeds its rounding error by far: each lambda is proven.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BISECTIONS = tl.constexpr(4)  # of the exponent of 2, from -6 to 0


def prepare_hessian(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """form (E, J, block, block) and weight (E, J, block), float32.

    Args:
        hessian: float32 (E, J, block, block), the last two contiguous.
    """
    e, j, size, _ = hessian.shape
    form, weight = torch.empty_like(hessian, memory_format=torch.contiguous_format), hessian.new_empty(e, j, size)
    if e * j:
        _prepare_hessian_kernel[(e * j,)](
            hessian, form, weight, j, hessian.stride(0), hessian.stride(1), SIZE=size, num_warps=1
        )
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
    largest = _largest_lambda(hessian, diagonal, on_diagonal, index, SIZE)
    # The factor leaves room for the float32 rounding of what it bounds.
    tl.store(weight_ptr + block * SIZE + index, (largest * 0.999 * diagonal).to(tl.float32))


@triton.jit
def _normalized(hessian, on_diagonal):
    peak = tl.max(tl.max(tl.where(on_diagonal, hessian, 0.0), axis=1), axis=0)
    exponent = peak.to(tl.int64, bitcast=True) >> 52
    scale = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    return tl.where(peak > 0.0, hessian * scale, on_diagonal.to(tl.float64))


@triton.jit
def _largest_lambda(hessian, diagonal, on_diagonal, index, SIZE: tl.constexpr):
    """The largest lambda that is tried and proven, or 0."""
    root = 1.0 / tl.sqrt(tl.where(diagonal > 0.0, diagonal, 1.0))
    correlation = tl.where(on_diagonal, 1.0, hessian * root[:, None] * root[None, :])
    # A row whose diagonal is zero must be zero; its weight then is zero, whatever lambda.
    sound = tl.min(tl.min(tl.where((diagonal[:, None] > 0.0) | (hessian == 0.0), 1, 0), axis=1), axis=0)
    largest = tl.sum(diagonal * 0.0, axis=0)
    tried = largest + 0.015625
    if (_definite(correlation, tried, on_diagonal, index, SIZE) * sound) > 0:
        largest = tried
        factor = tl.full((), 8.0, tl.float64)
        for _ in range(_BISECTIONS):
            if _definite(correlation, largest * factor, on_diagonal, index, SIZE) > 0:
                largest = largest * factor
            factor = tl.sqrt(factor)
    return largest


@triton.jit
def _definite(correlation, shift, on_diagonal, index, SIZE: tl.constexpr):
    """1 where correlation - shift * identity has only positive pivots, else 0 or less."""
    rest = correlation - tl.where(on_diagonal, shift + 1e-9, 0.0)
    passed = tl.full((), 1, tl.int32)
    for step in range(SIZE):
        row = tl.sum(tl.where(index[:, None] == step, rest, 0.0), axis=0)
        column = tl.sum(tl.where(index[None, :] == step, rest, 0.0), axis=1)
        pivot = tl.sum(tl.where(index == step, column, 0.0), axis=0)
        passed = tl.where(pivot > 0.0, passed, 0)
        inverse = passed / tl.where(pivot > 0.0, pivot, 1.0)
        rest -= column[:, None] * (row * inverse)[None, :]
    return passed
