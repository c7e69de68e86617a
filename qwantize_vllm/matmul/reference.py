"""x . W' in float32 from the dequantized weight: what every other backend is compared with."""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor


def matmul_reference(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype. Builds the float32 weight: for checking, not for serving."""
    y = x.float() @ q.dequantize(torch.float32).mT
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)
