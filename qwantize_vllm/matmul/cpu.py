"""x . W' on a CPU: a strip of rows is dequantized to x's dtype, multiplied, and forgotten: for many tokens.

The strip holds the bits of `Nvfp4Tensor.dequantize(x.dtype)`, so the result is that of a dense layer
with the dequantized weight.
"""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.cpu_strips import dequantize_strip
from qwantize_vllm.matmul.dense import multiply_dense

# Weights of a strip, which stays in the caches until the products have read it, and what its rows are a multiple of:
# oneDNN takes up to twice as long for numbers that its tiles do not divide.
_STRIP_ELEMENTS, _STRIP_ROWS = 2 * 1024 * 1024, 128
# PyTorch has oneDNN compile a product of 16-bit numbers for every number of rows, and keeps a thousand of them, a
# megabyte each and more. In pieces of so many rows, the last one filled up to a multiple of _STEP, there are eight.
_ROWS, _STEP = 256, 32


def matmul_cpu(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype; needs memory for one strip beyond input and output."""
    n, k = q.shape
    y = x.new_empty(x.shape[0], n)
    pieces = _pieces(x)
    blocks = -(-_STRIP_ELEMENTS // (k * _STRIP_ROWS))
    rows = max(1, min(n, blocks * _STRIP_ROWS))
    memory = x.new_empty(rows, k)  # the same for all strips: the system takes its time to give new memory
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        strip = memory[: n - start]
        dequantize_strip(q, part, strip)
        for tokens, piece in pieces:
            product = multiply_dense(piece, strip, None if bias is None else bias[part])
            y[tokens, part] = product[: y[tokens].shape[0]]
    return y


def _pieces(x: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """x by pieces of its rows, each with where it lies and as it is multiplied: filled up with zeros."""
    if x.dtype == torch.float32:  # not oneDNN's
        return [(slice(None), x)]
    pieces = [(slice(start, start + _ROWS), x[start : start + _ROWS]) for start in range(0, x.shape[0], _ROWS)]
    return [(rows, torch.nn.functional.pad(piece, (0, 0, 0, -piece.shape[0] % _STEP))) for rows, piece in pieces]
