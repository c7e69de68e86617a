"""The dense product, which follows where a weight is dequantized first."""

from __future__ import annotations

import torch


def multiply_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) times weight (N, K) in x's dtype -> (M, N) in x's dtype.

    bias: (N,), any float dtype. `linear` takes none but x's; any other is added as it is, and the sum rounded.
    """
    if bias is None or bias.dtype == x.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    y = torch.nn.functional.linear(x, weight)
    y += bias
    return y
