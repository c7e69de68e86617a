"""`refine: codes`: coordinate descent on the codes of a block, the reference and the kernel."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.format import FLOAT_DTYPES, e2m1_values, unpack_codes
from qwantize_vllm.search.searches import ReferenceSearches, TritonSearches
from tests.devices import kernel_device
from tests.numbers import make_weight, quadratic, residuals
from tests.search.test_search import make_hessians

KINDS = ["gaussian", "student", "outlier", "million", "denormal", "grid", "zero"]


@pytest.fixture(params=["reference", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def quantize(request, monkeypatch):
    """quantize_nvfp4 under "hessian", its codes refined by the reference or by a kernel; the result on the CPU."""
    device = kernel_device(request.param)
    if request.param != "reference":
        pytest.importorskip("triton")
        # Only what is tested here runs in the interpreter.
        monkeypatch.setattr(ReferenceSearches, "refine", TritonSearches.refine)

    def run(weight, hessian, block_size=16, refine="codes"):
        weight, hessian = weight.to(device), hessian.to(device)
        q = quantize_nvfp4(weight, "hessian", block_size, hessian=hessian, refine=refine, backend="reference")
        return q.to("cpu")

    return run


def correlated(blocks, block_size, seed=0):
    """Hessians of inputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(blocks, 200, 1, generator=generator)
    x = torch.randn(blocks, 200, block_size, generator=generator) + shared
    return x.mT @ x


def errors(weight, q, hessian):
    return quadratic(residuals(weight, q), hessian)


@pytest.mark.parametrize(("block_size", "kind"), [*((16, kind) for kind in KINDS), (32, "gaussian"), (32, "grid")])
def test_no_block_becomes_worse(quantize, block_size, kind):
    weight, hessian = make_weight(kind, 37, 5 * block_size), make_hessians(5, block_size)
    plain, refined = quantize(weight, hessian, block_size, "none"), quantize(weight, hessian, block_size)
    assert torch.equal(plain.block_scales.view(torch.uint8), refined.block_scales.view(torch.uint8))
    before, after = errors(weight, plain, hessian), errors(weight, refined, hessian)
    changed = (unpack_codes(plain.codes) != unpack_codes(refined.codes)).unflatten(-1, (-1, block_size)).any(-1)
    changed[:, 0] = False  # H = 0 counts as the identity, under which nothing is gained but what rounding left
    # Of numbers that both end in rounding; the fourth H is nearly singular.
    assert (after <= before * (1 + 1e-9))[changed].all()
    if kind in ("gaussian", "student", "outlier"):
        assert after[:, 1].sum() < 0.5 * before[:, 1].sum()
        assert after[:, 4].sum() < 0.99 * before[:, 4].sum()


def test_no_single_code_can_be_changed_for_the_better(quantize):
    weight, hessian = make_weight("gaussian", 40, 32), correlated(2, 16)
    q = quantize(weight, hessian)
    values = e2m1_values().double()
    least = errors(weight, q, hessian)
    codes = unpack_codes(q.codes).view(40, 2, 16)
    scale = q.block_scales.double()
    residual = residuals(weight, q)
    for element in range(16):
        for value in values:
            changed = residual.clone()
            changed[..., element] += (values[codes[..., element].long()] - value) * scale
            assert (quadratic(changed, hessian) >= least * (1 - 1e-5)).all()
    assert least.sum() < 0.97 * errors(weight, quantize(weight, hessian, refine="none"), hessian).sum()


def test_under_a_diagonal_hessian_the_nearest_codes_stay(quantize):
    weight = make_weight("gaussian", 33, 48)
    hessian = torch.diag_embed(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) + 0.1)
    assert torch.equal(quantize(weight, hessian).codes, quantize(weight, hessian, refine="none").codes)


@pytest.mark.parametrize(("block_size", "dtype"), [*((16, dtype) for dtype in FLOAT_DTYPES), (32, torch.bfloat16)])
def test_kernel_agrees_with_the_reference(kernel_on, block_size, dtype):
    weight, hessian = make_weight("student", 50, 4 * block_size, dtype), correlated(4, block_size)
    reference = quantize_nvfp4(weight, "hessian", block_size, hessian=hessian, refine="codes", backend="reference")
    on_device = (weight.to(kernel_on), "hessian", block_size, "amax", hessian.to(kernel_on))
    kernel = quantize_nvfp4(*on_device, refine="codes", backend="triton").to("cpu")
    same = (unpack_codes(kernel.codes) == unpack_codes(reference.codes)).unflatten(-1, (-1, block_size)).all(-1)
    # A gain within the rounding of float32 may be taken or not.
    assert same.float().mean() > 0.98
    difference = errors(weight, kernel, hessian).sum() / errors(weight, reference, hessian).sum() - 1
    assert abs(difference) < 1e-3


def test_batches_strides_and_the_default_dtype_do_not_matter(quantize):
    weight = torch.stack([make_weight("gaussian", 9, 32, torch.bfloat16, seed=i) for i in range(3)])
    hessian = torch.stack([correlated(2, 16, seed=i) for i in range(3)])
    wanted = [quantize(weight[i], hessian[i]).codes for i in range(3)]
    shared = quantize(weight, hessian[0])
    assert torch.equal(shared.codes[0], wanted[0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        batch = quantize(weight.mT.contiguous().mT, hessian.mT.contiguous().mT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(batch.codes[i], wanted[i]) for i in range(3))
    assert quantize(weight[:, :0], hessian).shape == (3, 0, 32)


def test_more_rows_than_a_program_takes(quantize, monkeypatch):
    tiles = pytest.importorskip("qwantize_vllm.search.triton_tiles")
    weight, hessian = make_weight("gaussian", 70, 32), correlated(2, 16)
    wanted = quantize(weight, hessian).codes
    monkeypatch.setattr(tiles, "_INTERPRETER_TILE", 16)
    assert torch.equal(quantize(weight, hessian).codes, wanted)


@pytest.mark.parametrize("refine", ["codes", "gptq", "all"])
def test_refining_without_hessians_is_refused(refine):
    with pytest.raises(ValueError, match=f"refine must be one of .* got '{refine}', 'optimal'"):
        quantize_nvfp4(torch.ones(2, 32), refine=refine)
