"""x . W' on a CPU: a strip of rows is dequantized to x's dtype, multiplied, and forgotten: for many tokens.

The strip holds the bits of `Nvfp4Tensor.dequantize(x.dtype)`, so the result is that of a dense layer
with the dequantized weight.
"""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor, dequantize_rows

# Weights of a strip: its temporaries stay in the caches until the product has read it.
_STRIP_ELEMENTS = 1024 * 1024


def matmul_cpu(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype; needs memory for one strip beyond input and output."""
    n, k = q.shape
    y = x.new_empty(x.shape[0], n)
    rows = max(1, _STRIP_ELEMENTS // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        strip = dequantize_rows(q.codes[part], q.block_scales[part], q.global_scale, q.block_size).to(x.dtype)
        y[:, part] = torch.nn.functional.linear(x, strip, None if bias is None else bias[part])
    return y
