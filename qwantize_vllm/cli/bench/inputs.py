"""Random weights, activations and Hessians; speed hardly depends on more than their distribution."""

from __future__ import annotations

import torch

from qwantize_vllm.hessian import block_hessian

WEIGHT_STD = 0.02
TOKENS = 4096
SEED = 0
# Inputs whose activations exist at once: 16 MiB of them.
_STRIP = 1024


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Gaussian weights of standard deviation 0.02; the same ones in every run on a device."""
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, WEIGHT_STD, generator=generator)


def random_hessian(k: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Block Hessians of 4096 tokens of Gaussian activations, float32 (K/block_size, block_size, block_size).

    As in real activations the inputs differ in size and go together: each is half its own noise and half
    the token's, times a factor exp(normal). Independent ones would give multiples of the identity.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    token = torch.randn(TOKENS, 1, generator=generator, device=device)
    strips = []
    for start in range(0, k, _STRIP):
        own = torch.randn(TOKENS, min(_STRIP, k - start), generator=generator, device=device)
        size = torch.randn(own.shape[1], generator=generator, device=device).exp()
        strips.append(block_hessian((own + token) * size, block_size))
    return torch.cat(strips)


def random_activations(tokens: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Gaussian activations (tokens, K) of standard deviation 1; the same ones in every run on a device."""
    generator = torch.Generator(device).manual_seed(SEED + 1)  # not the weights' numbers once more
    return torch.empty(tokens, k, dtype=dtype, device=device).normal_(generator=generator)
