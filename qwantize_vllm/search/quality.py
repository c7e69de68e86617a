"""How much of a weight its quantization keeps."""

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
