"""Energies of a weight and its error, and of what they give out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm import block_hessian, quantize_nvfp4
from qwantize_vllm.search import quality, triton_quality
from tests.numbers import make_weight


@pytest.mark.parametrize("hessian_block", [16, 32])
def test_output_energies_are_those_of_each_blocks_output(hessian_block, monkeypatch):
    monkeypatch.setitem(quality._CHUNK_ELEMENTS, "cpu", 7 * 96)  # several chunks, the last one smaller
    weight = make_weight("gaussian", 24, 96, torch.bfloat16)
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(1)) @ torch.randn(96, 96)
    q = quantize_nvfp4(weight)
    signal, noise = quality.output_signal_and_noise(weight, q, block_hessian(x, hessian_block))
    error = weight.double() - q.dequantize().double()
    for found, rows in ((signal, weight.double()), (noise, error)):
        parts = zip(x.double().split(hessian_block, 1), rows.split(hessian_block, 1), strict=True)
        assert found.item() == pytest.approx(sum((a @ b.T).square().sum().item() for a, b in parts), rel=1e-5)
    assert quality.signal_and_noise(weight, q)[1].item() == pytest.approx(error.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_measures_what_pytorch_does(kernel_on, monkeypatch, dtype, block_size):
    monkeypatch.setattr(triton_quality, "_INTERPRETER_TILE", 1024)  # several programs, the last one not full
    weight = make_weight("student", 37, 96, dtype)
    q = quantize_nvfp4(weight, block_size=block_size)
    kernel = triton_quality.signal_and_noise_triton(weight.to(kernel_on), q.to(kernel_on))
    assert [each.dtype for each in kernel] == [torch.float64, torch.float64]
    assert list(map(float, kernel)) == pytest.approx(list(map(float, quality.signal_and_noise(weight, q))), rel=1e-5)


def test_a_hessian_of_other_blocks_is_refused():
    weight = make_weight("gaussian", 8, 96, torch.bfloat16)
    with pytest.raises(ValueError, match="does not fit a weight with K=96"):
        quality.output_signal_and_noise(weight, quantize_nvfp4(weight), torch.zeros(2, 16, 16))
