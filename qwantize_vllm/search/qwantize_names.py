"""The function names and signatures of the published `qwantize` package (0.1.1), over this package's searches.

Code written for `from qwantize import nvfp4_optimal_triton` runs unchanged with
`from qwantize_vllm.search.qwantize_names import nvfp4_optimal_triton`. As there, a block is the whole
of dimension `dim`, the global scale is 1, and scales and quants come back as float32 values, not codes.
Different from there: the result is the optimum on every block, an all-zero block has the smallest
scale instead of NaN, and midpoints round to the even code, as NVIDIA's hardware does.
"""

from __future__ import annotations

import torch

from qwantize_vllm.format import check_block_size, e2m1_values, unpack_codes
from qwantize_vllm.hessian import block_hessian
from qwantize_vllm.search.quantize import ScaleSearch, SearchBackend, quantize_nvfp4


def nvfp4_naive(W: torch.Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[torch.Tensor, ...]:
    """Scales by snap(amax/6), PyTorch reference. See `nvfp4_optimal` for shapes."""
    return _quantize(W, dim, return_dequant, "naive", "reference")


def nvfp4_optimal(W: torch.Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[torch.Tensor, ...]:
    """Scales of least squared error, PyTorch reference.

    Args:
        W: float32, bfloat16 or float16; W.shape[dim] is the block: 16 or 32.
        dim: the dimension that holds the block.
        return_dequant: also return the dequantized tensor.

    Returns:
        scales: float32, W's shape without dim. quants: float32 signed E2M1 values, W's shape.
        With return_dequant: quants * scales, float32, W's shape.

    Raises:
        ValueError: the block is not 16 or 32, the dtype is none of the above, W is not finite.
    """
    return _quantize(W, dim, return_dequant, "optimal", "reference")


def nvfp4_optimal_hessian(
    W: torch.Tensor, dim: int = -1, return_dequant: bool = False, X: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Scales of least output error r'Hr, PyTorch reference. See `nvfp4_optimal` for shapes.

    X: activations (tokens, K); the blocks of W, in row-major order, are those of an (N, K) weight.
    """
    return _quantize(W, dim, return_dequant, "hessian", "reference", X)


def nvfp4_naive_triton(W: torch.Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[torch.Tensor, ...]:
    """`nvfp4_naive` by the Triton kernel."""
    return _quantize(W, dim, return_dequant, "naive", "triton")


def nvfp4_optimal_triton(W: torch.Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[torch.Tensor, ...]:
    """`nvfp4_optimal` by the Triton kernel."""
    return _quantize(W, dim, return_dequant, "optimal", "triton")


def nvfp4_optimal_hessian_triton(
    W: torch.Tensor, dim: int = -1, return_dequant: bool = False, X: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """`nvfp4_optimal_hessian` by the Triton kernel."""
    return _quantize(W, dim, return_dequant, "hessian", "triton", X)


def _quantize(
    W: torch.Tensor,
    dim: int,
    return_dequant: bool,
    scale_search: ScaleSearch,
    backend: SearchBackend,
    X: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    block_size = W.shape[dim]
    check_block_size(block_size)
    moved = W.movedim(dim, -1)
    k, hessian = block_size, None
    if scale_search == "hessian":
        if X is None:
            raise ValueError("the Hessian search needs X, activations of shape (tokens, K)")
        k, hessian = X.shape[-1], block_hessian(X.to(W.device), block_size)
        if W.numel() % k:
            raise ValueError(f"W {tuple(W.shape)} must hold whole rows of K={k}, the width of X {tuple(X.shape)}")
    q = quantize_nvfp4(moved.reshape(-1, k), scale_search, block_size, "none", hessian, backend=backend)
    scales = q.block_scales.float().view(moved.shape[:-1])
    quants = e2m1_values(W.device)[unpack_codes(q.codes).long()].view(moved.shape)
    result = (scales, quants.movedim(-1, dim))
    return (*result, (quants * scales[..., None]).movedim(-1, dim)) if return_dequant else result
