"""vLLM's own kernels: what they are given, when they are refused, and on a GPU what they compute."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types

import pytest
import torch

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.plugin import vllm_kernels
from qwantize_vllm.plugin.vllm_kernels import KERNELS, PreparedWeight, why_not
from tests.numbers import make_weight


@pytest.fixture
def fake(monkeypatch):
    """In place of vLLM's "marlin" a kernel that multiplies with what it was given, and a GPU that torch believes in."""

    class Kernel:
        supported = (True, None)

        def __init__(self, config):
            assert config == "config"

        @classmethod
        def is_supported(cls):
            return cls.supported

        def process_weights_after_loading(self, layer):
            assert (layer.output_size_per_partition, layer.input_size_per_partition) == (48, 64)
            assert (layer.output_partition_sizes, layer.has_bias) == ([48], False)
            assert {name for name, _ in layer.named_parameters()} == {"weight", "weight_scale", "weight_global_scale"}
            layer.seen = (layer.weight.clone(), layer.weight_scale.float(), layer.weight_global_scale.clone())
            layer.weight.zero_()  # a kernel may repack in place

        def apply_weights(self, layer, x, bias):
            assert bias is None
            assert x.is_contiguous()
            codes, scales, global_scale = layer.seen
            q = Nvfp4Tensor(codes, scales.to(torch.float8_e4m3fn), global_scale)
            return x @ q.dequantize(layer.params_dtype).T

    folder = vllm_kernels._KERNELS
    modules = {
        "vllm": types.ModuleType("vllm"),
        "humming": types.ModuleType("humming"),
        f"{folder}.marlin": types.SimpleNamespace(MarlinNvFp4LinearKernel=Kernel),
        f"{folder}.humming": types.SimpleNamespace(),
        f"{folder}.base": types.SimpleNamespace(NvFp4LinearLayerConfig=lambda: "config"),
    }
    for name in ("vllm", "humming"):
        modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib, "import_module", lambda name: sys.modules[name])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return Kernel


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_gpu_the_reason_is_a_line(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not(kernel) == "needs a CUDA GPU"


def test_reasons_come_from_what_is_missing(fake, monkeypatch):
    assert why_not("marlin") is None
    assert why_not("humming").startswith("not as expected in vLLM ")
    fake.supported = (False, "compute capability 6.0")
    assert why_not("marlin") == "compute capability 6.0"
    fake.supported = (False, None)
    assert why_not("marlin") == "not supported on this GPU"
    monkeypatch.setitem(sys.modules, "humming", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "humming" else sys.modules[name])
    assert why_not("humming") == "humming-kernels is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not("marlin") == "vllm is not installed"


@pytest.mark.usefixtures("fake")
def test_a_kernel_gets_copies_of_the_tensors_and_the_bias_is_added_after_it():
    q = quantize_nvfp4(make_weight("gaussian", 48, 64, torch.bfloat16))
    codes = q.codes.clone()
    prepared = PreparedWeight("marlin", q.codes, q.block_scales, q.global_scale, torch.bfloat16)
    assert torch.equal(q.codes, codes)
    x, bias = torch.randn(3, 128).bfloat16()[:, ::2], torch.randn(48)
    y = x @ q.dequantize(torch.bfloat16).T
    assert torch.equal(prepared.apply(x), y)
    assert torch.equal(prepared.apply(x, bias), y + bias.bfloat16())


@pytest.mark.parametrize("block_size", [16, 32])
def test_other_blocks_and_batches_are_refused(block_size):
    weight = torch.ones(2, 32, 64) if block_size == 16 else torch.ones(32, 64)
    q = quantize_nvfp4(weight, block_size=block_size)
    with pytest.raises(ValueError, match="unbatched weight with blocks of 16"):
        PreparedWeight("marlin", q.codes, q.block_scales, q.global_scale, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (4096, 1024)])
@pytest.mark.parametrize("m", [1, 17, 300])
def test_a_kernel_multiplies_as_float64_does(kernel, dtype, n, k, m):
    if reason := why_not(kernel):
        pytest.skip(f"{kernel}: {reason}")
    q = quantize_nvfp4(make_weight("gaussian", n, k, dtype).cuda())
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    prepared = PreparedWeight(kernel, q.codes, q.block_scales, q.global_scale, dtype)
    exact = x.double() @ q.dequantize().double().T
    for got, wanted in ((prepared.apply(x), exact), (prepared.apply(x, bias), exact + bias.double())):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() < 5e-3 * wanted.norm()
