"""Weights to try the searches on, and the float64 truth that judges them."""

from __future__ import annotations

import torch

from qwantize_vllm.search.brute_force import least_quadratic, least_sse, quadratic, residuals, scaled, sse

__all__ = ["least_quadratic", "least_sse", "make_weight", "quadratic", "residuals", "scaled", "sse"]


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
