"""The forms in which a layer keeps its quantized weight."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from qwantize_vllm import QwantizeSettings, quantize_nvfp4
from qwantize_vllm.plugin import weights
from qwantize_vllm.plugin.weights import (
    LatentForm,
    PlainForm,
    QuantizedLayer,
    SwizzledForm,
    VllmForm,
    _ask_for_amx,
    choose_form,
)
from tests.matmul.test_matmul import TOLERANCE, relative_error
from tests.numbers import make_weight

WIDTHS = [[70], [48, 16, 6]]


def quantize(widths, device="cpu", seed=0):
    parts = [make_weight("gaussian", n, 96, torch.float16, seed=seed + n).to(device) for n in widths]
    return QuantizedLayer.of([quantize_nvfp4(part) for part in parts], torch.float16)


def exact_product(x, quantized):
    members = zip(quantized.codes.split(quantized.widths), quantized.block_scales.split(quantized.widths), strict=True)
    dense = [
        quantized.whole.__class__(codes, scales, scale).dequantize().double()
        for (codes, scales), scale in zip(members, quantized.global_scales, strict=True)
    ]
    return x.double() @ torch.cat(dense).T


def new_layer(device="cpu"):
    layer = torch.nn.Module()
    layer.register_parameter("weight", torch.nn.Parameter(torch.zeros(70, 96, device=device), requires_grad=False))
    return layer


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(
    "form_of", [lambda q: PlainForm(q, "auto"), lambda q: SwizzledForm(q, True)], ids=["plain", "swizzled"]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_form_multiplies_by_what_it_keeps(kernel_on, widths, form_of, with_bias):
    quantized = quantize(widths, kernel_on)
    layer, form = new_layer(kernel_on), form_of(quantized)
    kept = form.keep(layer, quantized)
    assert kept == sum(parameter.nbytes for parameter in layer.parameters())
    padded = 128 * (64 + 128 // 16) + 128 * 256 // 16 - 128 * 8 + 4 * 70  # rows to 128, columns to 128, scales to 256
    assert kept <= padded
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0)).half().to(kernel_on)
    bias = torch.linspace(-1, 1, 70, device=kernel_on).half() if with_bias else None
    exact = exact_product(x, quantized) + (0 if bias is None else bias.double())
    assert relative_error(form.apply(layer, x, bias), exact) < TOLERANCE[torch.float16]


def test_latent_attention_sees_bytes_and_leaves_its_input_as_it_is(kernel_on):
    """vLLM casts what is multiplied by it to the dtype of this weight, but for uint8 (0.25 to 0.33)."""
    quantized = quantize([70], kernel_on)
    layer, form = new_layer(kernel_on), LatentForm(quantized, fuse_norms=False)
    form.keep(layer, quantized)
    assert layer.weight.dtype == torch.uint8
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).half().to(kernel_on)
    assert relative_error(form.apply(layer, x, None), exact_product(x, quantized)) < TOLERANCE[torch.float16]
    form.keep(layer, quantize([70], kernel_on, seed=1))  # a reload
    assert layer.weight.dtype == torch.uint8


@pytest.mark.gpu
def test_the_projection_of_latent_attention_gets_that_form():
    form = choose_form(QwantizeSettings(), quantize([70], "cuda"), "model.layers.0.self_attn.kv_b_proj")
    assert isinstance(form, LatentForm)


def test_the_projection_of_latent_attention_is_not_for_kernels_of_vllm_that_it_would_misread(monkeypatch):
    name = "model.layers.0.self_attn.kv_b_proj"
    warnings = []
    monkeypatch.setattr(weights.logger, "warning", lambda *args: warnings.append(args[0] % args[1:]))
    monkeypatch.setattr(weights, "make_kernel", lambda name: KernelWithWorkspace())
    monkeypatch.setattr(weights, "takes_latent_words", lambda: False)
    assert isinstance(choose_form(QwantizeSettings(backend="marlin"), quantize([70]), name), PlainForm)
    assert f"{name} is served by backend auto, not by marlin" in warnings[0]
    monkeypatch.setattr(weights, "takes_latent_words", lambda: True)
    assert isinstance(choose_form(QwantizeSettings(backend="marlin"), quantize([70]), name), VllmForm)
    assert len(warnings) == 1


def test_a_reload_keeps_the_scratch_that_cuda_graphs_know(kernel_on):
    first, second = quantize([70], kernel_on), quantize([70], kernel_on, seed=1)
    layer, form = new_layer(kernel_on), SwizzledForm(first, fuse_norms=False)
    form.keep(layer, first)
    scratch = layer.weight_arrived
    scratch += 1  # what sleep mode may leave there
    form.keep(layer, second)
    assert layer.weight_arrived is scratch
    assert not scratch.any()
    x = torch.randn(3, 96).half().to(kernel_on)
    assert relative_error(form.apply(layer, x, None), exact_product(x, second)) < TOLERANCE[torch.float16]


class KernelWithWorkspace:
    """Makes them anew whenever it prepares a layer: a workspace, as Marlin of vLLM 0.25, and locks, as Humming."""

    def process_weights_after_loading(self, layer):
        layer.workspace = torch.full((4,), float(layer.weight_global_scale))
        self.locks = torch.zeros(4)


def test_a_reload_keeps_what_kernels_of_vllm_work_in(monkeypatch):
    kernel = KernelWithWorkspace()
    monkeypatch.setattr(weights, "make_kernel", lambda name: kernel)
    first, second = quantize([70]), quantize([70], seed=1)
    old, new = (float(each.global_scales[0]) for each in (first, second))  # vLLM 0.33 may write the new over the old
    layer, form = new_layer(), VllmForm("marlin")
    form.keep(layer, first)
    workspace, locks = layer.workspace, kernel.locks
    locks += 1  # what sleep mode may leave there
    form.keep(layer, second)
    assert layer.workspace is workspace
    assert workspace.tolist() == [new] * 4 != [old] * 4
    assert kernel.locks is locks
    assert not locks.any()


def test_a_cpu_gets_the_plain_form():
    assert isinstance(choose_form(QwantizeSettings(), quantize([70]), "o_proj"), PlainForm)


def test_amx_is_asked_for_before_the_attention_of_vllm_takes_it(monkeypatch):
    """A short prompt to a quantized model meets no dense product on its way there, which would ask."""
    asked = []
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True), raising=False)
    _ask_for_amx.cache_clear()
    choose_form(QwantizeSettings(), quantize([70]), "o_proj")
    assert asked == [True]
    _ask_for_amx.cache_clear()


@pytest.mark.gpu
def test_a_gpu_gets_the_swizzled_form_for_half_precision():
    quantized = quantize([70], "cuda")
    assert isinstance(choose_form(QwantizeSettings(), quantized, "o_proj"), SwizzledForm)
    assert isinstance(choose_form(QwantizeSettings(backend="dequantize"), quantized, "o_proj"), PlainForm)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_of_vllm_that_cannot_run_are_refused_by_name():
    with pytest.raises(ValueError, match="backend 'marlin' needs a CUDA GPU"):
        choose_form(QwantizeSettings(backend="marlin"), quantize([70]), "o_proj")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["vllm", "marlin"])
def test_kernels_of_vllm_multiply_by_what_they_made(backend):
    parts = [make_weight("gaussian", 512, 256, torch.bfloat16).cuda()]
    quantized = QuantizedLayer.of([quantize_nvfp4(part) for part in parts], torch.bfloat16)
    layer, form = new_layer("cuda"), choose_form(QwantizeSettings(backend=backend), quantized, "o_proj")
    assert isinstance(form, VllmForm)
    form.keep(layer, quantized)
    x = torch.randn(3, 256, device="cuda").bfloat16()
    assert relative_error(form.apply(layer, x, None), exact_product(x, quantized)) < 4e-3


def test_kernels_are_prepared_of_what_will_be_served(kernel_on, monkeypatch):
    prepared = []
    monkeypatch.setattr(weights, "prepare_kernels", prepared.append)
    layer, form = new_layer(kernel_on), SwizzledForm(quantize([48, 48], kernel_on), fuse_norms=True)
    layer.logical_widths = [48, 48]
    form.keep(layer, quantize([48, 48], kernel_on))
    (kernels,) = prepared
    assert (kernels.dtype, kernels.bias, kernels.normed, kernels.gated) == (torch.float16, None, True, True)
    assert torch.equal(kernels.weight.global_scale, layer.weight_global_scale)
    assert kernels.weight.words.data_ptr() == layer.weight.data_ptr(), "no copy is held"
