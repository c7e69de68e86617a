"""Kernels that start before the one before them is done: what they read is there, whatever came before."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.matmul.op import matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from tests.numbers import make_weight

REPLAYS = 50
K = 2048


def test_not_without_a_gpu():
    assert dependent_launch(torch.device("cpu")) == {"DEPENDENT": False}


def make_swizzled(seed):
    return swizzle(quantize_nvfp4(make_weight("gaussian", K, K, torch.bfloat16, seed).to("cuda")))


def slow(x):
    """x after a product that keeps the GPU busy, all of it written by the last kernel."""
    return torch.addmm(x, x, torch.zeros(K, K, dtype=x.dtype, device=x.device))


def copied(x):
    return torch.empty_like(x).copy_(x)


def filled(x):
    return torch.zeros_like(x).fill_(0.5)


def joined(x):
    """Half of x is made on another stream."""
    y, other, here = torch.empty_like(x), torch.cuda.Stream(), torch.cuda.current_stream()
    other.wait_stream(here)
    with torch.cuda.stream(other):
        y[:, : K // 2] = slow(x)[:, : K // 2]
    y[:, K // 2 :] = x[:, K // 2 :]
    here.wait_stream(other)
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("before", [slow, copied, filled, joined])
@pytest.mark.parametrize("tokens", [1, 2, 5, 30, 100, 300])
def test_reads_what_was_written_before(before, tokens):
    """A chain of products in a CUDA graph, each after other work, has the bits of one that waits after every kernel."""
    torch.manual_seed(tokens)
    device = torch.device("cuda")
    weights = [make_swizzled(seed) for seed in range(3)]
    x = torch.randn(tokens, K, device=device, dtype=torch.bfloat16)

    def chain(finish):
        y = x
        for weight in weights * 2:
            y = before(y)
            finish()
            tensors = (weight.words, weight.scales, weight.global_scale, weight.arrived)
            y = matmul_swizzled_op(y, *tensors, None, K, 16, "swizzled")
            finish()
            y = matmul_swizzled_op(y, *tensors, None, K, 16, "swizzled")
            finish()
        return y

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(lambda: None)
    for _ in range(REPLAYS):
        graph.replay()
        assert torch.equal(captured, expected)
        assert torch.equal(chain(lambda: None), expected)


@pytest.mark.gpu
def test_weights_may_be_written_right_before():
    """As a reload does: the product is of the new weight."""
    device = torch.device("cuda")
    one, two = make_swizzled(1), make_swizzled(2)
    x = torch.randn(1, K, device=device, dtype=torch.bfloat16)

    def product(weight):
        tensors = (weight.words, weight.scales, weight.global_scale, weight.arrived)
        return matmul_swizzled_op(x, *tensors, None, K, 16, "swizzled")

    old, new = product(one), product(two)
    assert not torch.equal(old, new)
    words = one.words.clone()
    for _ in range(REPLAYS):
        one.scales.copy_(two.scales)
        one.global_scale.copy_(two.global_scale)
        one.words.copy_(two.words)
        assert torch.equal(product(one), new)
        one.words.copy_(words)
        assert not torch.equal(product(one), new)
