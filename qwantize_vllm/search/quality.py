"""How much of a weight, and of what it gives out, its quantization keeps."""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor, dequantize_rows

# Weights compared at once, by device: small enough for a CPU's caches, large enough to fill a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**18}
_CHUNK_ELEMENTS_ELSEWHERE = 2**24


def signal_and_noise(weight: torch.Tensor, q: Nvfp4Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum w^2, sum (w - q)^2) of an (N, K) weight and its quantization, float64 scalars on its device.

    The signal-to-noise ratio in dB is 10*log10(signal/noise).
    """
    if weight.is_cuda and weight.is_contiguous():
        from qwantize_vllm.search.triton_quality import signal_and_noise_triton

        return signal_and_noise_triton(weight, q)
    n, k = weight.shape
    signal = torch.zeros((), dtype=torch.float64, device=weight.device)
    noise = torch.zeros_like(signal)
    rows = max(1, _CHUNK_ELEMENTS.get(weight.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        w = weight[part].float()
        error = dequantize_rows(q.codes[part], q.block_scales[part], q.global_scale, q.block_size).sub_(w)
        # Row by row in float32, across rows in float64: a weight has billions of elements.
        signal += torch.linalg.vector_norm(w, dim=1).double().square().sum()
        noise += torch.linalg.vector_norm(error, dim=1).double().square().sum()
    return signal, noise


def output_signal_and_noise(
    weight: torch.Tensor, q: Nvfp4Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum w'Hw, sum r'Hr) over the blocks of every row, r = w - q, float64 scalars on the weight's device.

    With H = sum of x x' over a block's inputs this is the energy of the block's part of the output, and of its error,
    summed over inputs, rows and blocks. What the parts of different blocks have in common, or cancel, is not in it.

    Args:
        weight: (N, K); q: its quantization, in blocks of any size.
        hessian: float32 (K/block, block, block), of blocks of any size.
    """
    n, k = weight.shape
    blocks, block_size, _ = hessian.shape
    if blocks * block_size != k:
        raise ValueError(f"hessian {tuple(hessian.shape)} does not fit a weight with K={k}")
    h = hessian.double()
    signal = torch.zeros((), dtype=torch.float64, device=weight.device)
    noise = torch.zeros_like(signal)
    rows = max(1, _CHUNK_ELEMENTS.get(weight.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        w = weight[part].double()
        error = w - dequantize_rows(q.codes[part], q.block_scales[part], q.global_scale, q.block_size)
        signal += _form(w, h)
        noise += _form(error, h)
    return signal, noise


def _form(rows: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Sum of v'Hv over the blocks v of (rows, K)."""
    v = rows.view(rows.shape[0], *h.shape[:2]).transpose(0, 1)
    return (v @ h).mul_(v).sum()
