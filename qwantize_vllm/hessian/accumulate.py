"""Block Hessians from activations."""

from __future__ import annotations

import torch

from qwantize_vllm.format import FLOAT_DTYPES, check_block_size

# Tokens multiplied at once: bounds the float32 copy of the activations.
_CHUNK_TOKENS = 8192


def block_hessian(activations: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """H_j = sum over tokens of x_j x_j', x_j the j-th block of a layer's input.

    Args:
        activations: (..., tokens, K) float32, bfloat16 or float16, K a multiple of block_size.
        block_size: 16 or 32.

    Returns:
        float32 (K/block_size, block_size, block_size) on the activations' device.

    Raises:
        ValueError: wrong dtype or shape; NaN or infinite activations.
    """
    check_block_size(block_size)
    if activations.dim() < 2 or activations.dtype not in FLOAT_DTYPES or activations.shape[-1] % block_size:
        raise ValueError(
            f"activations must be (..., tokens, K) in one of {FLOAT_DTYPES} with K a multiple of {block_size}, "
            f"got {tuple(activations.shape)} {activations.dtype}"
        )
    k = activations.shape[-1]
    total = torch.zeros(k // block_size, block_size, block_size, device=activations.device)
    for chunk in activations.reshape(-1, k).split(_CHUNK_TOKENS):
        x = chunk.float().view(-1, k // block_size, block_size).transpose(0, 1)
        total.baddbmm_(x.mT, x)
    if not bool(torch.isfinite(total).all()):
        raise ValueError(
            f"activations {tuple(activations.shape)} hold NaN or infinite elements, or their squares overflow"
        )
    return total
