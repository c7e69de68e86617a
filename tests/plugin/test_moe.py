"""Which layers of a mixture are quantized, and what is measured of its experts."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

from qwantize_vllm import QwantizeSettings, block_hessian, quantize_nvfp4
from qwantize_vllm.hessian import save_hessians
from qwantize_vllm.plugin.config import QwantizeConfig
from qwantize_vllm.plugin.linear import QwantizeLinearMethod, _open_hessians
from qwantize_vllm.plugin.measured_experts import ExpertSums, MeasuredExperts
from qwantize_vllm.plugin.moe import QwantizeMoEMethod, local_experts, why_not_experts
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.search.quantize import search_nvfp4


def config_with(**settings):
    config = QwantizeConfig()
    config._resolved = QwantizeSettings(towers="quantize", **settings)  # to tell towers a model would be needed
    return config


def replicated(dtype=torch.bfloat16):
    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    layer.params_dtype = dtype
    return layer


@pytest.fixture
def model_in_bfloat16():
    """The default dtype while vLLM builds it."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


GATES = ["gate", "router", "shared_expert_gate", "text_experts_gate", "v_router"]


@pytest.mark.parametrize("name", GATES)
def test_gates_are_left_unless_asked_for(name, model_in_bfloat16):
    layer = replicated()
    prefix = f"model.layers.0.mlp.{name}"
    assert isinstance(config_with().get_quant_method(layer, prefix), UnquantizedLinearMethod)
    assert isinstance(config_with(quantize_gates=True).get_quant_method(layer, prefix), QwantizeLinearMethod)
    # What merely sounds like one is quantized.
    for other in ("mlp.gate_proj", "per_layer_input_gate"):
        assert isinstance(config_with().get_quant_method(layer, f"model.layers.0.{other}"), QwantizeLinearMethod)


@pytest.mark.parametrize(
    ("prefix", "dtype"), [("score", torch.bfloat16), ("classifier", torch.bfloat16), ("model.a", torch.float32)]
)
def test_heads_and_layers_that_a_model_keeps_in_float32_are_left(prefix, dtype, model_in_bfloat16):
    method = config_with().get_quant_method(replicated(dtype), prefix)
    assert isinstance(method, UnquantizedLinearMethod)


def moe_config(**changes):
    values = {"hidden_dim": 64, "intermediate_size_per_partition": 32, "has_bias": False, "swiglu_limit": None}
    values["is_lora_enabled"] = False
    parallel = types.SimpleNamespace(use_all2all_kernels=False)
    more = {"activation": MoEActivation.SILU, "tp_rank": 0, "tp_size": 1, "moe_parallel_config": parallel}
    return types.SimpleNamespace(**values | more | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"has_bias": True}, "biases"),
        ({"activation": MoEActivation.SWIGLUOAI}, "activation swigluoai"),
        ({"activation": MoEActivation.RELU2_NO_MUL}, "activation relu2_no_mul"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"swiglu_limit": 7.0}, "silu and swiglu_limit"),
        ({"intermediate_size_per_partition": 40}, "K=40 is not a multiple of block_size 16"),
        ({"hidden_dim": 72}, "K=72 is not a multiple of block_size 16"),
        ({"hidden_dim": 72, "intermediate_size_per_partition": 40}, "K=72 and K=40 are not multiples of block_size 16"),
        ({"hidden_dim": 40, "intermediate_size_per_partition": 40}, "K=40 is not a multiple of block_size 16"),
    ],
)
def test_what_cannot_be_quantized_says_why(changes, reason):
    found = why_not_experts(moe_config(**changes), QwantizeSettings())
    assert found is None if reason is None else reason in found
    assert reason is None or not reason.startswith("K=") or found == reason


def test_experts_of_this_rank_in_the_order_in_which_it_holds_them():
    moe = types.SimpleNamespace(num_logical_experts=4)
    layer = types.SimpleNamespace(expert_map=torch.tensor([-1, 1, -1, 0]), local_num_experts=2, moe_config=moe)
    assert local_experts(layer) == [3, 1]
    # Load balancing has a copy of expert 1 in place 5.
    layer = types.SimpleNamespace(expert_map=torch.tensor([-1, -1, -1, 0, 1, 2]), local_num_experts=3, moe_config=moe)
    assert local_experts(layer) == [3, 0, 1]


def experts_layer(weights):
    layer = torch.nn.Module()
    for name, weight in weights.items():
        layer.register_parameter(f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
    layer.local_num_experts, layer.expert_map, layer.top_k = len(weights["w2"]), None, 2
    layer.activation, layer.apply_router_weight_on_input = MoEActivation.SILU, False
    layer.moe_config = moe_config()
    layer.quant_method = MeasuredExperts(layer.moe_config)
    return layer


def test_experts_measure_what_is_routed_to_them():
    generator = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(shape, generator=generator) / 8 for shape in ((4, 64, 64), (4, 64, 32)))
    layer = experts_layer({"w13": w13, "w2": w2})
    sums = ExpertSums(layer, 16)
    x = torch.randn(50, 64, generator=generator)
    logits = torch.randn(50, 4, generator=generator)
    logits[:, 2] = -torch.inf  # nobody is routed there
    weights, ids = logits.softmax(-1).topk(2)
    y = layer.quant_method.apply(layer, x, weights, ids)

    measured = {name: total for name, _, total in sums.totals()}
    assert sums.tokens == 50
    truth = torch.zeros(50, 64, dtype=torch.float64)
    for expert in range(4):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        scale = weights[token, choice].double()[:, None]
        gate, up = (x[token].double() @ w13[expert].double().T).chunk(2, dim=1)
        h = torch.nn.functional.silu(gate) * up
        truth[token] += scale * (h @ w2[expert].double().T)
        for name, inputs in (("w13", x[token].double()), ("w2", h)):
            blocks = (scale * inputs).unflatten(1, (inputs.shape[1] // 16, 16))
            expected = torch.einsum("tbi,tbj->bij", blocks, blocks)
            assert torch.allclose(measured[f"{expert}.{name}"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(y.double(), truth, rtol=1e-4, atol=1e-5)
    assert not measured["2.w13"].any()


def test_experts_that_are_measured_are_quantized_once():
    """vLLM asks for it when a layer's weights have arrived, and once more at the end. What is quantized twice may be
    others: where the largest weight of all was clipped, the global scale is."""
    generator = torch.Generator().manual_seed(0)
    layer = experts_layer({"w13": torch.randn(2, 64, 64, generator=generator), "w2": torch.randn(2, 64, 32)})
    settings, given = QwantizeSettings(), layer.w13_weight.clone()
    quantizer = QwantizeMoEMethod(settings, "mlp.experts", LoadReport(settings), layer.moe_config)
    calls, quantize = [], quantizer.quantize
    quantizer.quantize = lambda *each: calls.append(each[0]) or quantize(*each)
    layer.quant_method = MeasuredExperts(layer.moe_config, quantizer)
    for _ in range(2):
        layer.quant_method.process_weights_after_loading(layer)
    assert calls == ["w13", "w2"]
    assert torch.equal(layer.w13_weight[1], quantize_nvfp4(given[1]).dequantize(torch.float32))


def test_an_expert_that_was_never_reached_is_searched_by_optimal(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 64, 64, generator=generator)
    hessian = block_hessian(torch.randn(100, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    hessians = {"mlp.experts.0.w13": hessian, "mlp.experts.1.w13": torch.zeros(4, 16, 16)}
    hessians |= {f"mlp.experts.{i}.w2": torch.zeros(2, 16, 16) for i in range(2)}
    save_hessians(tmp_path / "h.safetensors", hessians, 16)
    settings = {"scale_search": "hessian", "hessian": tmp_path / "h.safetensors"}
    moe = moe_config(intermediate_size=32)
    layer = types.SimpleNamespace(expert_map=None, local_num_experts=2)

    method = QwantizeMoEMethod(QwantizeSettings(**settings), "mlp.experts", LoadReport(QwantizeSettings()), moe)
    method._find_hessians(layer, 64)
    q = method.quantize("w13", weight, [0, 1])
    for expert, expected in enumerate(
        (quantize_nvfp4(weight[0], "hessian", hessian=hessian), quantize_nvfp4(weight[1], "optimal"))
    ):
        assert torch.equal(q.codes[expert, 0], expected.codes)
        assert torch.equal(q.block_scales[expert, 0].view(torch.uint8), expected.block_scales.view(torch.uint8))

    assert method.why_optimal == "its experts [1], to which no token was routed"
    strict = QwantizeSettings(**settings, strict=True)
    method = QwantizeMoEMethod(strict, "mlp.experts", LoadReport(strict), moe)
    with pytest.raises(ValueError, match=r"mlp.experts: no token .* routed to experts \[1\]; calibrate on more text"):
        method._find_hessians(layer, 64)


def test_experts_are_read_from_the_cache_and_searched_where_it_has_them_not(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 64, 64, generator=generator)
    hessians = {f"mlp.experts.{i}.w13": block_hessian(torch.randn(99, 64, generator=generator)) for i in range(3)}
    settings = {"scale_search": "hessian", "hessian": tmp_path / "h.safetensors", "cache_dir": tmp_path / "cache"}
    searched = []

    def quantize(weight, hessians, **changes):
        save_hessians(tmp_path / "h.safetensors", hessians, 16)
        _open_hessians.cache_clear()
        given = QwantizeSettings(**settings | changes)
        searched.clear()
        return QwantizeMoEMethod(given, "mlp.experts", LoadReport(given), moe_config()).quantize(
            "w13", weight, range(3)
        )

    def note(*args, **kwargs):
        searched.append(args)
        return search_nvfp4(*args, **kwargs)

    monkeypatch.setattr("qwantize_vllm.plugin.moe.search_nvfp4", note)
    first = quantize(weight, hessians)
    assert len(searched) == 1
    again = quantize(weight.clone(), hessians)
    assert not searched
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.block_scales.view(torch.uint8), first.block_scales.view(torch.uint8))
    assert torch.equal(again.global_scale, first.global_scale)
    for given, others, changes in (
        (weight.clone().index_fill_(2, torch.tensor(3), 0.5), hessians, {}),
        (weight, {**hessians, "mlp.experts.2.w13": 2 * hessians["mlp.experts.1.w13"]}, {}),
        (weight, hessians, {"global_scale": "amax_per_member"}),
        (weight, hessians, {"refine": "codes"}),
    ):
        quantize(given, others, **changes)
        assert searched
        assert quantize(given, others, **changes).shape[1] == (2 if "global_scale" in changes else 1)
        assert not searched


def test_nan_is_refused_with_the_layers_name():
    method = QwantizeMoEMethod(QwantizeSettings(), "mlp.experts", LoadReport(QwantizeSettings()), moe_config())
    weight = torch.ones(3, 64, 64)
    weight[1, 5, 7] = torch.nan
    with pytest.raises(
        ValueError, match=r"qwantize: mlp.experts: w13 of all experts: weight \(3, 64, 64\) holds 1 NaN and 0 infinite"
    ):
        method.quantize("w13", weight, range(3))


def test_gate_and_up_have_a_global_scale_each_where_asked_for():
    settings = QwantizeSettings(global_scale="amax_per_member")
    method = QwantizeMoEMethod(settings, "mlp.experts", LoadReport(settings), moe_config())
    weight = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    q = method.quantize("w13", weight, range(3))
    assert q.shape == (3, 2, 32, 64)
    for expert, member in ((0, 0), (2, 1)):
        alone = quantize_nvfp4(weight[expert].chunk(2)[member])
        assert torch.equal(q.codes[expert, member], alone.codes)
        assert torch.equal(q.global_scale[expert, member], alone.global_scale)
    assert method.quantize("w2", weight, range(3)).shape == (3, 1, 64, 64)
