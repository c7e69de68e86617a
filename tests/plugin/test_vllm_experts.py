"""vLLM's Marlin kernel for experts: what it is given, on a machine without a GPU, where what is compiled is stubbed."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from qwantize_vllm import QwantizeSettings, quantize_nvfp4
from qwantize_vllm.plugin import vllm_experts
from qwantize_vllm.plugin.expert_weights import QuantizedExperts, choose_expert_form
from qwantize_vllm.plugin.vllm_experts import MarlinExperts, why_not_marlin

EXPERTS, K, INNER = 2, 128, 64


def module_of(name):
    return importlib.import_module(vllm_experts._CALLED[name][0])


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of fused_marlin_moe, by name, as the signature of the vLLM at hand has them."""
    from vllm import _custom_ops

    repack = inspect.signature(_custom_ops.gptq_marlin_repack)
    multiply = inspect.signature(vllm_experts._function("fused_marlin_moe"))
    made = []

    def repacked(*args, **kwargs):
        sizes = repack.bind(*args, **kwargs).arguments
        return torch.zeros(sizes["size_k"] // 16, 2 * sizes["size_n"], dtype=torch.int32)

    def multiplied(*args, **kwargs):
        made.append(multiply.bind(*args, **kwargs).arguments)
        return torch.zeros_like(made[-1]["hidden_states"])

    monkeypatch.setattr(_custom_ops, "gptq_marlin_repack", repacked)
    monkeypatch.setattr(module_of("fused_marlin_moe"), "fused_marlin_moe", multiplied)
    monkeypatch.setattr(module_of("marlin_make_workspace_new"), "num_compute_units", lambda *args: 3)
    return made


def expert_tensors(seed):
    """Codes, block scales and global scales (EXPERTS, 1) of w13 and w2."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(EXPERTS, *shape, generator=generator) for shape in ((2 * INNER, K), (K, INNER))]
    quantized = [quantize_nvfp4(weight, "naive") for weight in weights]
    return [(q.codes, q.block_scales, q.global_scale.reshape(EXPERTS, 1)) for q in quantized]


def expert_layer():
    layer = torch.nn.Module()
    layer.num_experts = layer.global_num_experts = EXPERTS
    layer.hidden_size, layer.intermediate_size_per_partition = K, INNER
    layer.activation, layer.expert_map = MoEActivation.SILU, None
    return layer


def serve(kernel, layer, seed):
    """Prepare weights and multiply by them once; what was prepared."""
    kept = kernel.prepare(layer, *expert_tensors(seed), torch.bfloat16)
    x, weights = torch.zeros(5, K).bfloat16(), torch.ones(5, 1).bfloat16()
    kernel.apply(layer, x, kept["w13"], kept["w2"], weights, torch.zeros(5, 1, dtype=torch.int32))
    return kept


def test_after_a_reload_the_kernel_gets_the_new_weights_and_the_same_cleared_workspace(calls):
    layer, kernel = expert_layer(), MarlinExperts()
    for seed in (0, 1):
        kept = serve(kernel, layer, seed)
        given = calls[-1]
        for i, name in ((1, "w13"), (2, "w2")):
            parts = (f"w{i}", f"w{i}_scale", f"global_scale{i}")
            assert all(given[part] is tensor for part, tensor in zip(parts, kept[name], strict=True))
            assert given[f"global_scale{i}"].shape == (EXPERTS,)
        assert given["topk_weights"].dtype == torch.float32
        assert not given["workspace"].any()
        given["workspace"].fill_(7)  # as sleep mode may
    first, second = calls
    assert first["workspace"] is second["workspace"]
    assert len(first["workspace"]) == 4 * 3
    assert not torch.equal(first["w1_scale"], second["w1_scale"])


def test_every_argument_is_one_whose_name_is_looked_for(calls):
    serve(MarlinExperts(), expert_layer(), 0)
    assert set(calls[0]) == set(vllm_experts._CALLED["fused_marlin_moe"][1].split())


@pytest.fixture
def gpu(monkeypatch):
    """One that torch and vLLM believe in."""
    module = module_of("is_fp4_marlin_supported")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "is_fp4_marlin_supported", lambda: True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["marlin", "vllm"])
def test_experts_are_served_by_marlin_under_either_name(backend, calls):
    generator = torch.Generator().manual_seed(0)
    w13, w2 = (
        quantize_nvfp4(torch.randn(EXPERTS, 1, *shape, generator=generator), "naive")
        for shape in ((2 * INNER, K), (K, INNER))
    )
    layer, experts = expert_layer(), QuantizedExperts(w13, w2, torch.bfloat16)
    form = choose_expert_form(QwantizeSettings(backend=backend), experts, "mlp.experts")
    assert form.keep(layer, experts) == sum(parameter.nbytes for parameter in layer.parameters())
    form.apply(layer, torch.zeros(1, K).bfloat16(), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
    assert calls[0]["w1"] is layer.w13_weight
    assert calls[0]["global_scale2"] is layer.w2_weight_global_scale


@pytest.mark.usefixtures("gpu")
def test_the_vllm_at_hand_has_what_is_called():
    assert why_not_marlin(torch.bfloat16) is None
    assert why_not_marlin(torch.float32) == "takes bfloat16 or float16, got torch.float32"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", list(vllm_experts._CALLED))
@pytest.mark.parametrize("change", ["gone", "wants another argument"])
def test_what_another_vllm_lacks_is_named(name, change, monkeypatch):
    module = module_of(name)
    if change == "gone":
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, lambda another: None)
    reason = why_not_marlin(torch.bfloat16)
    assert reason.startswith(f"is not as expected in this version of vLLM: {name}: ")


def test_without_a_gpu_the_reason_is_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_marlin(torch.bfloat16) == "needs a CUDA GPU"
