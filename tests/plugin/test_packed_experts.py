"""Experts of a checkpoint that is NVFP4 already: what is taken of them, and what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from qwantize_vllm import Nvfp4Tensor, QwantizeSettings, quantize_nvfp4
from qwantize_vllm.checkpoint import LAYOUTS
from qwantize_vllm.plugin.config import QwantizeConfig
from qwantize_vllm.plugin.packed_experts import PackedMoEMethod
from qwantize_vllm.plugin.packed_format import Packed
from qwantize_vllm.plugin.report import LoadReport

from .test_moe import moe_config

EXPERTS, K, INNER = 3, 64, 32
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def name_projections(layer):
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name = PROJECTIONS.values()


def quantized(seed=0, *, same=True):
    """By expert and shard; same: gate and up share a global scale, or the latter's is half of it."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for expert in range(EXPERTS):
        w13 = quantize_nvfp4(torch.randn(2 * INNER, K, generator=generator))
        for i, shard in enumerate(("w1", "w3")):
            half = slice(i * INNER, (i + 1) * INNER)
            scale = w13.global_scale if same or not i else w13.global_scale / 2
            found[expert, shard] = Nvfp4Tensor(w13.codes[half], w13.block_scales[half], scale)
        found[expert, "w2"] = quantize_nvfp4(torch.randn(K, INNER, generator=generator))
    return found


class Layer(torch.nn.Module):
    """What the method asks of RoutedExperts, with all experts here, or only those of `here`."""

    def __init__(self, here=range(EXPERTS)):
        super().__init__()
        self.here = list(here)
        self.expert_map = torch.tensor([self.here.index(i) if i in self.here else -1 for i in range(EXPERTS)])
        self.local_num_experts, self.moe_config = len(self.here), moe_config(num_logical_experts=EXPERTS)
        self.layer_name, self.global_num_experts = "mlp.experts", EXPERTS
        name_projections(self)

    def _map_global_expert_id_to_local_expert_id(self, expert):
        return int(self.expert_map[expert])

    def load(self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        """As vLLM's loader does for weights and block scales, on one rank."""
        place = self._map_global_expert_id_to_local_expert_id(expert_id)
        if place < 0:
            return False
        rows = slice(INNER, None) if shard_id == "w3" else slice(0, len(loaded_weight))
        param.data[place, rows].view(torch.uint8).copy_(loaded_weight.view(torch.uint8))
        return True


def method_for(layer, layout="compressed-tensors", activations=False, **settings):
    packed = Packed(LAYOUTS[layout], 16, activations)
    settings = QwantizeSettings(**settings)
    method = PackedMoEMethod(settings, "mlp.experts", LoadReport(settings), layer.moe_config, packed)
    method.create_weights(layer, layer.local_num_experts, K, INNER, torch.bfloat16, weight_loader=layer.load)
    return method


def load(layer, layout, weights, skip=(), extra=()):
    """Offer every tensor as vLLM does; then the layer is on the CPU and complete, as far as it will be."""
    for name, param in list(layer.named_parameters()):
        real = torch.nn.Parameter(torch.empty_like(param, device="cpu"), requires_grad=False)
        real.weight_loader = param.weight_loader.__wrapped__  # vLLM unwraps its own before it really loads
        setattr(layer, name, real)
    for (expert, shard), q in weights.items():
        tensors = LAYOUTS[layout].write("", q) | {f".{name}": torch.ones(1) for name in extra}
        for name, tensor in tensors.items():
            if (expert, shard, name[1:]) not in skip:
                param = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{name[1:]}")
                param.weight_loader(param, tensor, name, shard_id=shard, expert_id=expert, return_success=True)


def assert_holds(layer, weights):
    for place, expert in enumerate(layer.here):
        for weight, shards in (("w13", ("w1", "w3")), ("w2", ("w2",))):
            members = [weights[expert, shard] for shard in shards]
            held = [getattr(layer, f"{weight}_weight{part}")[place] for part in ("", "_scale", "_global_scale")]
            assert torch.equal(held[0], torch.cat([q.codes for q in members]))
            scales = torch.cat([q.block_scales.view(torch.uint8) for q in members])
            assert torch.equal(held[1].view(torch.uint8), scales)
            assert torch.equal(held[2].expand(len(members)), torch.stack([q.global_scale for q in members]))


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("here", [range(EXPERTS), [2, 0]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_scales_go_in_as_they_are(layout, here, same):
    layer, weights = Layer(here), quantized(same=same)
    activations = layout != "qwantize"
    extra = {"compressed-tensors": ["input_global_scale"], "modelopt": ["input_scale"], "qwantize": []}[layout]
    method = method_for(layer, layout, activations)
    load(layer, layout, weights, extra=extra)
    method.process_weights_after_loading(layer)
    assert_holds(layer, weights)
    assert layer.w13_weight_global_scale.shape == (len(layer.here), 1 if same else 2)
    parts = ("weight", "weight_scale", "weight_global_scale")
    names = {f"{name}_{part}" for name in ("w13", "w2") for part in parts}
    assert {name for name, _ in layer.named_parameters()} == names
    # Experts of other ranks are still offered, under names that the layer has no parameter of any more.
    for name in {*LAYOUTS[layout].names, *extra} - set(parts):
        used_up = getattr(layer, f"w13_{name}")
        assert used_up.weight_loader(used_up, torch.ones(1), "", shard_id="w1", expert_id=1) is False


def test_a_tensor_that_is_lacking_is_named():
    layer, layout = Layer(), "compressed-tensors"
    method = method_for(layer)
    load(layer, layout, quantized(), skip={(1, "w3", "weight_scale"), (2, "w2", "weight_packed")})
    with pytest.raises(ValueError, match=r"mlp.experts: the checkpoint lacks 2 tensors .*, 1.up_proj.weight_scale am"):
        method.process_weights_after_loading(layer)


def test_experts_of_other_ranks_are_not_waited_for():
    layer, weights = Layer([1]), quantized()
    method = method_for(layer)
    load(layer, "compressed-tensors", {key: q for key, q in weights.items() if key[0] == 1})
    method.process_weights_after_loading(layer)
    assert_holds(layer, weights)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"block_scales": 0xFF}, "mlp.experts: w2: weight_scale holds 1 block scales that are NaN or negative"),
        ({"global_scale": torch.inf}, "mlp.experts: w2: weight_global_scale gives the global scales .0.0., which must"),
    ],
)
def test_scales_that_are_none_are_refused(damage, message):
    layer, weights = Layer(), quantized()
    method = method_for(layer)
    load(layer, "compressed-tensors", weights)
    if "block_scales" in damage:
        layer.w2_weight_scale.data.view(torch.uint8)[1, 2, 0] = damage["block_scales"]
    else:
        layer.w2_weight_global_scale.data[1] = damage["global_scale"]
    with pytest.raises(ValueError, match=message):
        method.process_weights_after_loading(layer)


def test_another_dtype_is_refused():
    layer = Layer()
    method_for(layer)
    param = layer.w2_weight_packed
    loader = param.weight_loader.__wrapped__
    real = torch.nn.Parameter(torch.empty_like(param, device="cpu"), requires_grad=False)
    with pytest.raises(ValueError, match=r"mlp.experts.1: tensor weight_packed is torch.int8 in the checkpoint"):
        loader(real, torch.zeros(K, INNER // 2, dtype=torch.int8), "", shard_id="w2", expert_id=1)


def test_kernels_that_take_one_global_scale_refuse_two():
    layer = Layer()
    method = method_for(layer, backend="marlin")
    load(layer, "compressed-tensors", quantized(same=False))
    with pytest.raises(ValueError, match="takes one global scale for gate and up, those of this layer have different"):
        method.process_weights_after_loading(layer)


def reload(method, layer, weights):
    fresh = Layer()
    method.create_weights(fresh, EXPERTS, K, INNER, torch.bfloat16, weight_loader=fresh.load)
    load(fresh, "compressed-tensors", weights)
    method.process_weights_after_loading(fresh)
    return fresh


def test_a_reload_may_not_need_more_global_scales_than_there_are():
    layer = Layer()
    method = method_for(layer)
    load(layer, "compressed-tensors", quantized())
    method.process_weights_after_loading(layer)
    assert_holds(reload(method, layer, quantized(1)), quantized(1))
    with pytest.raises(ValueError, match="different global scales in the weights that are loaded now"):
        reload(method, layer, quantized(same=False))


def packed_config(layout="compressed-tensors", ignore=()):
    config = QwantizeConfig.from_config(LAYOUTS[layout].config(["lm_head", *ignore], 16))
    config._resolved = QwantizeSettings()
    return config


def routed_experts(**changes):
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = moe_config(num_logical_experts=2, **changes)
    name_projections(layer)
    return layer


ALL = [f"model.layers.1.mlp.experts.{i}.{name}" for i in range(2) for name in PROJECTIONS.values()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_taken_unless_the_checkpoint_ignores_them(layout):
    config = packed_config(layout, ALL)
    assert isinstance(config.get_quant_method(routed_experts(), "model.layers.0.mlp.experts"), PackedMoEMethod)
    assert isinstance(config.get_quant_method(routed_experts(), "model.layers.11.mlp.experts"), PackedMoEMethod)
    left = routed_experts()
    assert config.get_quant_method(left, "model.layers.1.mlp.experts") is None
    assert config.report.reason(left) == "not quantized in the checkpoint"


def test_experts_that_are_quantized_in_parts_are_refused():
    config = packed_config(ignore=[name for name in ALL if "down" in name])
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts is NVFP4 in parts only: .*down_proj': False"):
        config.get_quant_method(routed_experts(), "model.layers.1.mlp.experts")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_bias": True}, "biases are not supported yet"),
        ({"activation": MoEActivation.SWIGLUOAI}, "activation swigluoai"),
        ({"is_lora_enabled": True}, "with LoRA"),
        ({"intermediate_size_per_partition": 40}, "K=40 is not a multiple of block_size 16"),
    ],
)
def test_experts_that_cannot_be_served_from_codes_are_refused(changes, reason):
    layer = routed_experts(**changes)
    with pytest.raises(ValueError, match=rf"mlp.experts \(RoutedExperts\) is NVFP4 .*{reason}.*leave --quant"):
        packed_config().get_quant_method(layer, "model.layers.0.mlp.experts")


def test_heads_are_refused():
    head = ParallelLMHead.__new__(ParallelLMHead)
    torch.nn.Module.__init__(head)
    config = QwantizeConfig.from_config({**LAYOUTS["modelopt"].config([], 16), "ignore": []})
    config._resolved = QwantizeSettings()
    with pytest.raises(ValueError, match=r"lm_head \(ParallelLMHead\) is NVFP4 .*only linear layers and experts are"):
        config.get_quant_method(head, "lm_head")


def test_vllm_is_asked_for_the_scales_of_a_cache_only_where_there_are_some():
    from vllm.model_executor.layers.attention import Attention

    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    assert packed_config().get_quant_method(layer, "attn") is None
    given = LAYOUTS["compressed-tensors"].config(["lm_head"], 16)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config = QwantizeConfig.from_config({**given, "kv_cache_scheme": scheme})
    config._resolved = QwantizeSettings()
    assert type(config.get_quant_method(layer, "attn")).__name__ == "CompressedTensorsKVCacheMethod"
