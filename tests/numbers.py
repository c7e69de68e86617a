"""Float64 truth for the scale searches, and weights to try them on."""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor, e2m1_values, e4m3_values, round_to_e2m1, unpack_codes


def make_weight(kind: str, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """(n, k) weights of a named distribution, standard deviation about 0.02."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, k, generator=generator)
    if kind == "student":
        chi = sum(torch.randn(n, k, generator=generator).square() for _ in range(3)) / 3
        normal = normal / chi.sqrt()
    elif kind == "uniform":
        normal = torch.rand(n, k, generator=generator) * 2 - 1
    elif kind == "sparse":
        normal = normal * (torch.rand(n, k, generator=generator) < 0.1)
    elif kind == "outlier":
        normal[:, k // 2] *= 1000
    elif kind == "million":
        normal[n // 2, k // 2] = 1e6
    elif kind == "denormal":
        return normal * 1e-39
    elif kind == "zero":
        normal = normal * 0
    elif kind == "grid":  # exact ties everywhere
        normal = torch.randint(-24, 25, (n, k), generator=generator) / 4.0
        return normal.to(dtype)
    elif kind != "gaussian":
        raise ValueError(kind)
    return (normal * 0.02).to(dtype)


def scaled(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """w/g in float64, (..., blocks, block)."""
    g = q.global_scale.double().reshape(*q.global_scale.shape, 1, 1)
    return (weight.double() / g).unflatten(-1, (-1, q.block_size))


def residuals(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """(w - q)/g in float64, (..., blocks, block)."""
    values = e2m1_values(q.device).double()[unpack_codes(q.codes).long()].unflatten(-1, (-1, q.block_size))
    return scaled(weight, q) - values * q.block_scales.double()[..., None]


def sse(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """Squared error of every block, in units of g^2."""
    return residuals(weight, q).square().sum(-1)


def least_sse(weight: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """The least squared error of every block over all 126 codes, by trying each in float64."""
    z = scaled(weight, q)
    best = torch.full(z.shape[:-1], torch.inf, dtype=torch.float64, device=z.device)
    for residual in _residuals_of_all_codes(weight, q):
        best = torch.minimum(best, residual.square().sum(-1))
    return best


def quadratic(residual: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """r'Hr of every block."""
    return torch.einsum("...ja,jab,...jb->...j", residual, hessian.double(), residual)


def least_quadratic(weight: torch.Tensor, q: Nvfp4Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The least r'Hr of every block over all 126 codes, by trying each in float64."""
    errors = [quadratic(residual, hessian) for residual in _residuals_of_all_codes(weight, q)]
    return torch.stack(errors).amin(0)


def _residuals_of_all_codes(weight: torch.Tensor, q: Nvfp4Tensor):
    """Codes are by definition those of w/g rounded once to float32; residuals of them are exact here."""
    z = scaled(weight, q)
    g = q.global_scale.reshape(*q.global_scale.shape, 1, 1)
    z32 = (weight.float() / g).unflatten(-1, (-1, q.block_size))
    values = e2m1_values(z.device).double()
    for scale in e4m3_values(z.device):
        yield z - values[round_to_e2m1(z32 / scale).long()] * scale.double()
