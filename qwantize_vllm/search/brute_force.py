"""Float64 truth for the scale searches: what each promises, by trying all 126 codes.

Slow and plain on purpose. The tests judge every search by it, `qwantize bench quantize` a sample of blocks.
Errors are in units of the global scale g, so that they can be compared between blocks of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwantize_vllm.format import E2M1_MAX, E4M3_MAX, Nvfp4Tensor, e2m1_values, e4m3_values, round_to_e2m1, unpack_codes

# How far above the least error the error of a chosen scale may lie; `quantize_nvfp4` promises it.
SSE_TOLERANCE = 1e-5
QUADRATIC_TOLERANCE = 1e-4
QUADRATIC_FLOOR = 1e-7  # times tr(H)*|r|^2, for an H that is singular or nearly so


def scaled(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """w/g in float64: (..., N, K) -> (..., N, K/block, block)."""
    return (weight.double() / _per_matrix(q).double()).unflatten(-1, (-1, q.block_size))


def residuals(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """(w - q)/g in float64, (..., N, K/block, block)."""
    values = e2m1_values(q.device).double()[unpack_codes(q.codes).long()].unflatten(-1, (-1, q.block_size))
    return scaled(weight, q) - values * q.block_scales.double()[..., None]


def sse(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """Squared error of every block, float64 (..., N, K/block)."""
    return residuals(weight, q).square().sum(-1)


def least_sse(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """The least squared error of every block over all 126 codes; of q only the global scale and block size count."""
    return _least(residual.square().sum(-1) for residual in _residuals_of_all_codes(weight, q))


def quadratic(residual: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """r'Hr of every block: r float64 (..., N, J, block), H (J, block, block), with or without the batch in front."""
    return torch.einsum("...nja,...jab,...njb->...nj", residual, hessian.double(), residual)


def least_quadratic(weight: torch.Tensor, q: Nvfp4Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The least r'Hr of every block over all 126 codes; of q only the global scale and block size count."""
    return _least(quadratic(residual, hessian) for residual in _residuals_of_all_codes(weight, q))


def largest_allowed_sse(least: torch.Tensor) -> torch.Tensor:
    """The largest squared error that keeps the promise of "optimal", the least error given."""
    return least * (1 + SSE_TOLERANCE)


def largest_allowed_quadratic(least: torch.Tensor, residual: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The largest r'Hr that keeps the promise of "hessian", the least given; shapes as in `quadratic`."""
    trace = hessian.double().diagonal(dim1=-2, dim2=-1).sum(-1).unsqueeze(-2)
    return least * (1 + QUADRATIC_TOLERANCE) + QUADRATIC_FLOOR * trace * residual.square().sum(-1)


def snapped_scales(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """The scales that "naive" has by definition, float8_e4m3fn: amax/6 of w/g in float32, snapped, never zero."""
    z = (weight.float() / _per_matrix(q)).unflatten(-1, (-1, q.block_size))
    smallest = e4m3_values(z.device)[0]
    amax = z.abs().amax(-1)
    # By a tensor: CUDA divides by a Python number as a multiplication by its rounded reciprocal.
    return (amax / torch.full_like(amax, E2M1_MAX)).clamp(smallest, E4M3_MAX).to(torch.float8_e4m3fn)


def nearest_codes(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """The E2M1 codes that q must have at its scales, uint8 (..., N, K): those of w/g in float32, ties to even."""
    z = (weight.float() / _per_matrix(q)).unflatten(-1, (-1, q.block_size))
    return round_to_e2m1(z / q.block_scales.float()[..., None]).flatten(-2)


def _per_matrix(q: Nvfp4Tensor) -> torch.Tensor:
    return q.global_scale.reshape(*q.global_scale.shape, 1, 1)


def _residuals_of_all_codes(weight: torch.Tensor, q: Nvfp4Tensor) -> Iterator[torch.Tensor]:
    """Codes are by definition those of w/g rounded once to float32; residuals of them are exact here."""
    z = scaled(weight, q)
    z32 = (weight.float() / _per_matrix(q)).unflatten(-1, (-1, q.block_size))
    values = e2m1_values(z.device).double()
    for scale in e4m3_values(z.device):
        yield z - values[round_to_e2m1(z32 / scale).long()] * scale.double()


def _least(errors: Iterator[torch.Tensor]) -> torch.Tensor:
    best = next(errors)
    for error in errors:
        best = torch.minimum(best, error)
    return best
