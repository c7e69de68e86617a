"""The `qwantize` package (0.1.1), to compare with."""

from __future__ import annotations

import torch
from exactness_verdict import Peer


def qwantize_peer(device: str) -> Peer:
    """Its Triton kernels on a GPU, its PyTorch reference elsewhere: its kernels hold PTX and run nowhere else.

    It has no global scale, so it is given the weight in units of ours, as float32.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    import qwantize

    kernels = torch.device(device).type == "cuda"
    optimal = qwantize.nvfp4_optimal_triton if kernels else qwantize.nvfp4_optimal
    hessian = qwantize.nvfp4_optimal_hessian_triton if kernels else qwantize.nvfp4_optimal_hessian

    def search(z: torch.Tensor, activations: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = z.reshape(-1, z.shape[-1])
        if activations is None:
            scales, _, dequantized = optimal(blocks, return_dequant=True)
        else:
            scales, _, dequantized = hessian(blocks, return_dequant=True, X=activations)
        return scales.view(*z.shape[:-1], 1), dequantized.view(z.shape)

    return search


def hessian_of(activations: torch.Tensor, block_size: int) -> torch.Tensor:
    """H = X'X of every block, float32 (columns, block, block), by the same operations as in the package.

    So that both searches minimize the same r'Hr to the last bit.
    """
    blocks = activations.float().split(block_size, dim=1)
    zero = torch.zeros(block_size, block_size, device=activations.device)
    return torch.stack([zero.clone().addmm_(x.T, x) for x in blocks])
