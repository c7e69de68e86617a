"""Hessians from activations: the blocks on their diagonals, or all of them."""

from __future__ import annotations

import torch

from qwantize_vllm.format import FLOAT_DTYPES, check_block_size

# Tokens multiplied at once: bounds the float32 copy of the activations.
_CHUNK_TOKENS = 8192


class BlockHessianSum:
    """H_j = sum over tokens of x_j x_j', x_j the j-th block of a layer's input, as activations come in.

    Attributes:
        total: float32 (k/block_size, block_size, block_size), the sum so far.
        tokens: how many went into it.

    Raises:
        ValueError: k is not a multiple of block_size.
    """

    def __init__(self, k: int, block_size: int, device: torch.device | str) -> None:
        check_block_size(block_size)
        if k % block_size:
            raise ValueError(f"K must be a multiple of block_size {block_size}, got {k}")
        self.total = torch.zeros(k // block_size, block_size, block_size, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, activations: torch.Tensor) -> None:
        """activations: (..., k), any float dtype, on the device of the sum."""
        blocks, block_size, _ = self.total.shape
        activations = activations.reshape(-1, blocks * block_size)
        self.tokens += activations.shape[0]
        if activations.is_cuda:
            from qwantize_vllm.hessian.triton_accumulate import add_blocks

            add_blocks(self.total, activations)
            return
        for chunk in activations.split(_CHUNK_TOKENS):
            x = chunk.float().view(-1, blocks, block_size).transpose(0, 1)
            self.total.baddbmm_(x.mT, x)


class FullHessianSum:
    """H = sum over tokens of x x', x a layer's whole input, as activations come in.

    A token costs K*K multiply-adds, K/block_size times what its blocks do, and H takes 4*K*K bytes.

    Attributes:
        total: float32 (k, k), the sum so far.
        tokens: how many went into it.
    """

    def __init__(self, k: int, device: torch.device | str) -> None:
        self.total = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, activations: torch.Tensor) -> None:
        """activations: (..., k), any float dtype, on the device of the sum."""
        for chunk in activations.reshape(-1, self.total.shape[0]).split(_CHUNK_TOKENS):
            x = chunk.float()
            self.total.addmm_(x.mT, x)
            self.tokens += chunk.shape[0]


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
    hessian = BlockHessianSum(activations.shape[-1], block_size, activations.device)
    hessian.add(activations)
    if not bool(torch.isfinite(hessian.total).all()):
        raise ValueError(
            f"activations {tuple(activations.shape)} hold NaN or infinite elements, or their squares overflow"
        )
    return hessian.total
