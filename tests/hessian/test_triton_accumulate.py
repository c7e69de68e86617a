from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm.hessian.triton_accumulate import add_blocks


def exact_sum(x: torch.Tensor, size: int) -> torch.Tensor:
    blocks = x.double().unflatten(1, (-1, size))
    return torch.einsum("tja,tjb->jab", blocks, blocks)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 64, 131])
def test_the_sum_of_outer_products_of_each_block(kernel_on, size, dtype, tokens):
    x = torch.randn(tokens, 96, device=kernel_on).to(dtype)
    total = torch.zeros(96 // size, size, size, device=kernel_on)
    add_blocks(total, x)
    exact = exact_sum(x, size)
    assert (total.double() - exact).norm() < 1e-6 * exact.norm()
    once = total.clone()
    add_blocks(total, x)
    assert (total.double() - 2 * exact).norm() < 2e-6 * exact.norm()
    again = torch.zeros_like(total)
    add_blocks(again, x)
    assert torch.equal(again, once)


def test_activations_may_be_a_view_and_may_be_none(kernel_on):
    x = torch.randn(80, 40, device=kernel_on).T  # tokens 40 lie side by side
    total = torch.zeros(5, 16, 16, device=kernel_on)
    add_blocks(total, x[:0])
    assert not total.any()
    add_blocks(total, x)
    assert torch.allclose(total.double(), exact_sum(x, 16), rtol=1e-5, atol=1e-5)
