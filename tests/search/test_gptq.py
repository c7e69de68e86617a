"""`refine: gptq`: blocks that repair what those before them broke."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4
from qwantize_vllm.search.gptq import GptqOptions, damp, diagonal_blocks, upper_factor
from tests.devices import kernel_device
from tests.numbers import make_weight


@pytest.fixture(params=["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def quantize(request):
    """quantize_nvfp4 with refine "gptq", the result on the CPU."""
    device = kernel_device(request.param)

    def run(weight, hessian, block_size=16, global_scale="amax", **options):
        backend = "reference" if request.param == "reference" else "triton"
        arguments = {"refine": "gptq", "gptq": GptqOptions(**options), "backend": backend}
        weight, hessian = weight.to(device), hessian.to(device)
        return quantize_nvfp4(weight, "hessian", block_size, global_scale, hessian, **arguments).to("cpu")

    return run


def inputs_in_common(k, seed=0):
    """The Hessian (k, k) of inputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -1, k)[torch.randperm(k, generator=generator)]
    mixing = torch.randn(k, k, generator=generator) * sizes
    x = torch.randn(4 * k, k, generator=generator) @ mixing
    return x.mT @ x


def output_error(weight, q: Nvfp4Tensor, hessian):
    error = weight.double() - q.dequantize().double()
    return ((error @ hessian.double()) * error).sum()


def same(q, other):
    scales = [each.block_scales.view(torch.uint8) for each in (q, other)]
    return torch.equal(q.codes, other.codes) and torch.equal(*scales)


@pytest.mark.parametrize(("order", "block_size"), [("natural", 16), ("loss", 16), ("loss", 32)])
def test_the_output_is_nearer_than_with_blocks_alone(quantize, order, block_size):
    weight, hessian = make_weight("gaussian", 24, 96), inputs_in_common(96)
    blocks = diagonal_blocks(hessian, block_size)
    alone = quantize_nvfp4(weight, "hessian", block_size, hessian=blocks, refine="codes")
    q = quantize(weight, hessian, block_size, order=order)
    assert output_error(weight, q, hessian) < 0.75 * output_error(weight, alone, hessian)


@pytest.mark.parametrize("order", ["natural", "loss"])
def test_sweeps_bring_it_nearer_still(quantize, order):
    weight, hessian = make_weight("gaussian", 24, 96), inputs_in_common(96)
    once, twice, more = (quantize(weight, hessian, order=order, sweeps=sweeps) for sweeps in (0, 1, 3))
    damped = damp(hessian, 0.01)  # which is what falls
    errors = [output_error(weight, q, damped) for q in (once, twice, more)]
    assert errors[1] < 0.999 * errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-6)
    scales = [q.block_scales.view(torch.uint8) for q in (once, more)]
    assert torch.equal(*scales)


def test_inputs_that_have_nothing_in_common_leave_nothing_to_repair(quantize):
    weight = make_weight("student", 20, 64)
    hessian = torch.eye(64) * 3
    alone = quantize_nvfp4(weight, "hessian", hessian=diagonal_blocks(hessian, 16))
    assert same(quantize(weight, hessian), alone)
    assert same(quantize(weight, hessian, order="natural"), alone)
    assert same(quantize(weight, hessian * 0), alone)


def test_the_second_of_two_blocks_is_what_the_first_ones_error_makes_of_it(quantize):
    """By the normal equations: given the residuals r of the first, H_22 d = -H_21 r is the best for the second."""
    weight, hessian = make_weight("gaussian", 30, 32), inputs_in_common(32)
    q = quantize(weight, hessian, order="natural")
    damped = damp(hessian, 0.01)
    first = (weight - q.dequantize())[:, :16].double()
    wanted = weight[:, 16:] + (first @ damped[:16, 16:] @ torch.linalg.inv(damped[16:, 16:])).float()
    arguments = {"hessian": damped[None, 16:, 16:].float(), "refine": "codes"}
    second = quantize_nvfp4(wanted, "hessian", 16, q.global_scale, **arguments)
    agrees = (second.codes == q.codes[:, 8:]).all(dim=1)
    assert agrees.float().mean() > 0.9  # float32 on both ways: a tie may fall either way
    assert not torch.equal(q.codes[:, 8:], quantize_nvfp4(weight[:, 16:], "hessian", 16, **arguments).codes)


def test_rows_do_not_depend_on_each_other(quantize):
    weight, hessian = make_weight("gaussian", 21, 64, torch.bfloat16), inputs_in_common(64)
    q = quantize(weight, hessian, order="natural")
    part = quantize(weight[5:9], hessian, global_scale=q.global_scale, order="natural")
    assert (part.codes == q.codes[5:9]).float().mean() > 0.98  # a product of other shapes rounds otherwise


def test_a_batch_is_its_matrices_whatever_the_default_dtype(quantize):
    weight = torch.stack([make_weight("gaussian", 6, 32, torch.bfloat16, seed=i) for i in range(2)])
    hessian = torch.stack([inputs_in_common(32, seed=i) for i in range(2)])
    damped = damp(hessian[0], 0.01)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(damp(hessian[0], 0.01), damped)
        batch, shared = quantize(weight, hessian), quantize(weight, hessian[0], order="natural")
    finally:
        torch.set_default_dtype(torch.float32)
    for i in range(2):
        assert same(batch[i], quantize(weight[i], hessian[i]))
        assert same(shared[i], quantize(weight[i], hessian[0], order="natural"))
    assert quantize(weight[:, :0], hessian).shape == (2, 0, 32)


def test_the_kernels_give_what_the_reference_gives(kernel_on):
    weight, hessian = make_weight("gaussian", 20, 32), inputs_in_common(32)
    reference = quantize_nvfp4(weight, "hessian", hessian=hessian, refine="gptq", backend="reference")
    on_device = (weight.to(kernel_on), "hessian", 16, "amax", hessian.to(kernel_on))
    kernel = quantize_nvfp4(*on_device, refine="gptq", backend="triton").to("cpu")
    assert (kernel.codes == reference.codes).float().mean() > 0.9
    errors = [float(output_error(weight, q, hessian)) for q in (kernel, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_the_factor_is_upper_triangular_and_gives_back_the_hessian():
    damped = damp(inputs_in_common(48), 0.01)
    factor = upper_factor(damped)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor @ factor.mT, damped, rtol=1e-12, atol=1e-12)
    assert damped.diagonal().mean() == pytest.approx(1.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hessian": torch.ones(2, 16, 16)}, r"hessian must be float32 \(32, 32\), got torch.float32 \(2, 16, 16\)"),
        ({"hessian": torch.eye(32) - 0.5}, "is not positive definite"),
        ({"hessian": torch.full((32, 32), torch.inf)}, "1024 non-finite"),
    ],
)
def test_wrong_hessians_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(torch.ones(3, 32), "hessian", refine="gptq", **arguments)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="damping must be over 0, got 0"):
        GptqOptions(damping=0)
    with pytest.raises(ValueError, match="sweeps must be 0 or more, got -1"):
        GptqOptions(sweeps=-1)
    with pytest.raises(ValueError, match=r"order must be one of .* got 'random'"):
        GptqOptions(order="random")


def test_blocks_on_the_diagonal():
    hessian = torch.arange(64.0 * 64).view(64, 64)
    wanted = [hessian[j : j + 16, j : j + 16] for j in range(0, 64, 16)]
    assert torch.equal(diagonal_blocks(hessian, 16), torch.stack(wanted))
