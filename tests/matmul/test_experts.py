"""The experts of a mixture against float64: the grouped kernel, interpreted and on a GPU, and the loop over experts."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.matmul.experts import ACTIVATIONS, swizzle_experts
from qwantize_vllm.matmul.experts_cpu import activate, experts_one_by_one
from qwantize_vllm.matmul.reference import matmul_reference
from tests.matmul.test_matmul import INTERPRETED_BFLOAT16, TOLERANCE, relative_error

HALVES = [torch.bfloat16, torch.float16]


def make(device, tokens, experts, top_k, hidden, intermediate, dtype, block_size=16, seed=0):
    """x, w13 (E, 2I, H), w2 (E, H, I), weights and ids of the experts that each token is routed to."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    w13 = quantize_nvfp4((randn(experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype), "naive", block_size)
    w2 = quantize_nvfp4((randn(experts, hidden, intermediate) / intermediate**0.5).to(dtype), "naive", block_size)
    weights, ids = randn(tokens, experts).softmax(-1).topk(top_k)
    x = randn(tokens, hidden).to(dtype)
    return tuple(value.to(device) for value in (x, w13, w2, weights, ids))


def exact(x, w13, w2, weights, ids, activation="silu"):
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64, device=x.device)
    for token, choice in (ids >= 0).nonzero().tolist():
        expert = int(ids[token, choice])
        gate, up = (w13[expert].dequantize().double() @ x[token].double()).chunk(2)
        h = activate(gate, activation) * up
        y[token] += weights[token, choice].double() * (w2[expert].dequantize().double() @ h)
    return y


def swizzled(w13, w2):
    members = w13.global_scale[:, None]
    first = swizzle_experts(w13.codes, w13.block_scales, members, w13.block_size, gated=True)
    second = swizzle_experts(w2.codes, w2.block_scales, w2.global_scale[:, None], w2.block_size, gated=False)
    return first, second


def tolerance(device, dtype):
    """Three results are rounded one after the other, h, z and y: independently, or by the interpreter always down."""
    return 3 * INTERPRETED_BFLOAT16 if device == "cpu" and dtype == torch.bfloat16 else 3**0.5 * TOLERANCE[dtype]


def grouped(x, w13, w2, weights, ids, activation="silu", shapes=None):
    from qwantize_vllm.matmul.triton_grouped import experts_swizzled

    return experts_swizzled(x, *swizzled(w13, w2), weights, ids, activation, shapes)


@pytest.mark.parametrize(("dtype", "block_size"), [(torch.bfloat16, 16), (torch.float16, 32)])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (7, 8, 3), (40, 2, 1), (140, 5, 2)])
def test_grouped_against_float64(kernel_on, dtype, block_size, tokens, experts, top_k):
    pytest.importorskip("triton")
    case = make(kernel_on, tokens, experts, top_k, 96, 160, dtype, block_size)
    y = grouped(*case)
    assert y.dtype == dtype
    assert relative_error(y, exact(*case)) < tolerance(kernel_on, dtype)


@pytest.mark.parametrize("tokens", [3, 150])
def test_experts_that_are_elsewhere_count_nothing(kernel_on, tokens):
    pytest.importorskip("triton")
    x, w13, w2, weights, ids = make(kernel_on, tokens, 6, 2, 64, 64, torch.float16)
    ids = torch.where(ids % 2 == 0, ids, -1)
    ids[0] = -1
    y = grouped(x, w13, w2, weights, ids)
    assert not y[0].any()
    assert relative_error(y, exact(x, w13, w2, weights, ids)) < tolerance(kernel_on, torch.float16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(kernel_on, activation):
    pytest.importorskip("triton")
    case = make(kernel_on, 5, 4, 2, 64, 64, torch.float16)
    assert relative_error(grouped(*case, activation), exact(*case, activation)) < tolerance(kernel_on, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_by_one_against_float64(dtype, activation):
    x, w13, w2, weights, ids = make("cpu", 9, 4, 2, 64, 96, dtype)
    ids[3, 1] = -1
    y = experts_one_by_one(x, [w13], w2, weights, ids, activation, matmul_reference)
    # gate, up, their product, z and y are rounded.
    assert relative_error(y, exact(x, w13, w2, weights, ids, activation)) < 5**0.5 * TOLERANCE[dtype]
