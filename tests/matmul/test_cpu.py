from __future__ import annotations

import pytest
import torch

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.matmul.cpu import _pieces, matmul_cpu


def test_there_are_few_shapes_whatever_the_number_of_tokens():
    """oneDNN keeps compiled code for each of them: a server's memory grew by a gigabyte."""
    shapes = {piece.shape for m in range(1, 1100) for _, piece in _pieces(torch.empty(m, 16, dtype=torch.bfloat16))}
    assert len(shapes) == 8


@pytest.mark.parametrize("m", [1, 33, 256, 257, 600])
def test_pieces_are_the_product(m):
    q = quantize_nvfp4(torch.randn(48, 64, dtype=torch.bfloat16))
    x, bias = torch.randn(m, 64).bfloat16(), torch.randn(48).bfloat16()
    expected = x.double() @ q.dequantize(torch.bfloat16).double().T + bias.double()
    assert (matmul_cpu(x, q, bias) - expected).abs().max() <= 2**-7 * expected.abs().max()
