"""`backend: vllm` where vLLM believes in a Blackwell GPU with FlashInfer: the kernel that it selects there for 16-bit
activations gets what it reads. FlashInfer's own functions are stood in for."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

pytest.importorskip("vllm")

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability, PlatformEnum

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.plugin.versions import installed
from qwantize_vllm.plugin.weights import QuantizedLayer, VllmForm
from tests.numbers import make_weight

LINEAR = importlib.import_module("vllm.model_executor.kernels.linear")
FLASHINFER = importlib.import_module("vllm.model_executor.kernels.linear.nvfp4.flashinfer")
KERNEL = "FlashInferCuteDslNvFp4W4A16LinearKernel"

pytestmark = pytest.mark.skipif(Version(installed()) < Version("0.30"), reason="vLLM before 0.30 has no such kernel")


@pytest.fixture
def blackwell(monkeypatch):
    def prepare(weight, scale, global_scale, backend):
        assert (backend, global_scale.shape) == ("cute-dsl", (1,))
        return weight, scale, global_scale

    def multiply(x, weight, scale, global_scale):
        # vLLM has padded the rows of the weight, as it does those of scales where it swizzles them.
        return x @ Nvfp4Tensor(weight[: len(scale)], scale, global_scale[0]).dequantize(x.dtype).T

    platform = SimpleNamespace(
        is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(10, 0), _enum=PlatformEnum.CUDA
    )
    for module in (LINEAR, FLASHINFER):
        monkeypatch.setattr(module, "current_platform", platform)
    monkeypatch.setattr(FLASHINFER, "has_flashinfer_bf16_fp4", lambda: True)
    monkeypatch.setattr(FLASHINFER, "flashinfer_prepare_bf16_fp4_weights", prepare)
    monkeypatch.setattr(FLASHINFER, "swizzle_blockscale", lambda scale: scale)
    monkeypatch.setattr(torch.ops.vllm, "flashinfer_mm_bf16_fp4", multiply, raising=False)
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_selected_kernel_gets_what_it_reads(blackwell, with_bias):
    form = VllmForm("vllm")
    assert type(form.kernel).__name__ == KERNEL
    layer = torch.nn.Module()
    bias = torch.randn(48) if with_bias else None
    for seed in range(2):  # a start and a reload
        q = quantize_nvfp4(make_weight("gaussian", 48, 256, torch.bfloat16, seed))
        form.keep(layer, QuantizedLayer.of([q], torch.bfloat16))
        x = torch.randn(3, 5, 256).bfloat16()
        wanted = x @ q.dequantize(torch.bfloat16).T
        wanted = wanted if bias is None else wanted + bias.bfloat16()
        assert torch.equal(form.apply(layer, x, bias), wanted)
