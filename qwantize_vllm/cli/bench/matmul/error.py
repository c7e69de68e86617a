"""How far a product is from float64, by a sample of its rows."""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor

# Of an output in half precision: rounding it once to bfloat16 gives 1.7e-3.
LARGEST_RELATIVE_ERROR = 3e-3
SAMPLED_ROWS = 256
# Weights dequantized at once: 32 MiB in float64.
_STRIP = 2**22


def sampled_rows(tokens: int, device: torch.device) -> torch.Tensor:
    """Which rows of an output (tokens, N) are looked at: 256 evenly spread, the first and the last among them."""
    count = min(tokens, SAMPLED_ROWS)
    return torch.tensor([i * (tokens - 1) // max(1, count - 1) for i in range(count)], device=device)


def exact_product(x: torch.Tensor, q: Nvfp4Tensor) -> torch.Tensor:
    """x (rows, K) . W' in float64, from the weight as `q.dequantize()` gives it."""
    n, k = q.shape
    y = torch.empty(x.shape[0], n, dtype=torch.float64, device=x.device)
    step = max(1, _STRIP // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        strip = Nvfp4Tensor(q.codes[part], q.block_scales[part], q.global_scale, q.block_size)
        y[:, part] = x.double() @ strip.dequantize().double().T
    return y


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """||y - exact|| / ||exact||; infinite where y holds NaN."""
    return float(((y.double() - exact).norm() / exact.norm()).nan_to_num(torch.inf, posinf=torch.inf))
