"""Kernel and reference against float64 on whatever hypothesis can think of."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.format import round_to_e2m1, unpack_codes
from tests.numbers import least_sse, sse


@st.composite
def weights(draw):
    """(N, K) weights of any dtype, strides and magnitudes, with zeros and outliers, and their block size."""
    block_size = draw(st.sampled_from([16, 32]))
    n, blocks = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    k = block_size * blocks
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(n, k, generator=generator)
    values *= 10.0 ** draw(st.integers(-4, 4))
    values *= torch.rand(n, k, generator=generator) < draw(st.sampled_from([0.05, 0.5, 1.0]))
    if draw(st.booleans()):
        values[draw(st.integers(0, n - 1)), draw(st.integers(0, k - 1))] *= 10.0 ** draw(st.integers(0, 4))
    # Finite in float16 too: an overflow there would be the conversion's, not the search's.
    weight = values.clamp(-6e4, 6e4).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "sliced":
        weight = torch.stack([weight, torch.zeros_like(weight)], dim=-1)[..., 0]
    return weight, block_size


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=weights(), global_scale=st.sampled_from(["amax", "none"]))
def test_optimal_is_optimal_whatever_the_weight(kernel_on, case, global_scale):
    weight, block_size = case
    kernel = quantize_nvfp4(weight.to(kernel_on), "optimal", block_size, global_scale, backend="triton").to("cpu")
    reference = quantize_nvfp4(weight, "optimal", block_size, global_scale, backend="reference")
    least = least_sse(weight, reference)
    for q in (kernel, reference):
        assert (sse(weight, q) <= least * (1 + 1e-5)).all()
        z = (weight.float() / q.global_scale).unflatten(-1, (-1, block_size))
        wanted = round_to_e2m1(z / q.block_scales.float()[..., None]).flatten(-2)
        assert torch.equal(unpack_codes(q.codes), wanted)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=weights(), global_scale=st.sampled_from(["amax", "none"]))
def test_naive_kernel_and_reference_agree_bit_for_bit(kernel_on, case, global_scale):
    weight, block_size = case
    kernel = quantize_nvfp4(weight.to(kernel_on), "naive", block_size, global_scale, backend="triton").to("cpu")
    reference = quantize_nvfp4(weight, "naive", block_size, global_scale, backend="reference")
    assert torch.equal(kernel.block_scales.view(torch.uint8), reference.block_scales.view(torch.uint8))
    assert torch.equal(kernel.codes, reference.codes)
