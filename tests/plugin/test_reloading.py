"""What came of a layer, and what did not."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from qwantize_vllm.plugin import reloading
from qwantize_vllm.plugin.reloading import check_arrived, check_bias_arrived


@pytest.mark.parametrize(
    ("model", "draft", "refused"),
    [("auto", None, True), ("dummy", None, False), ("auto", "dummy", False), ("auto", "auto", True)],
)
def test_a_layer_without_weights_is_refused_unless_vllm_writes_random_ones(monkeypatch, model, draft, refused):
    formats = [SimpleNamespace(load_format=each) for each in (model, draft)]
    speculative = None if draft is None else SimpleNamespace(draft_load_config=formats[1])
    config = SimpleNamespace(load_config=formats[0], speculative_config=speculative)
    monkeypatch.setattr(reloading, "get_current_vllm_config_or_none", lambda: config)
    with pytest.raises(ValueError, match="o_proj: the checkpoint has no weight") if refused else nullcontext():
        check_arrived(torch.nn.Linear(2, 2), "o_proj", 4, "o_proj")


def test_parts_that_a_loader_tells_apart_by_name_alone(monkeypatch):
    """As DBRX's: gate and up of all experts, which are one parameter here."""
    layer = torch.nn.Linear(2, 2)
    given = [SimpleNamespace(arguments={"weight_name": name, "expert_id": None}) for name in ("mlp.w1", "mlp.v1")]
    info = SimpleNamespace(load_numel=4, loaded_weights=[("w13_weight", each) for each in given])
    monkeypatch.setattr(reloading.layerwise, "get_layerwise_info", lambda layer: info)
    check_arrived(layer, "ffn.experts", 4, "gate and up")
    info.loaded_weights.append(info.loaded_weights[0])
    with pytest.raises(ValueError, match=r"w13_weight mlp\.w1 was given more than once"):
        check_arrived(layer, "ffn.experts", 4, "gate and up")


def bias_of(parts, kernel_tensors=({}, {}), restored=("weight", "bias")):
    """vLLM's notes of an update that has these parts of a bias."""
    given = [("bias", SimpleNamespace(arguments={"loaded_shard_id": part})) for part in parts]
    weight = ("weight", SimpleNamespace(arguments={"loaded_shard_id": None}))
    return SimpleNamespace(
        kernel_tensors=kernel_tensors, restore_metadata=(dict.fromkeys(restored), {}), loaded_weights=[weight, *given]
    )


@pytest.mark.parametrize(
    ("info", "given"),
    [
        (bias_of([]), 0),
        (bias_of(["q", "v"]), 2),
        (bias_of([(0, 1)]), 2),
        (bias_of(["q", "k", "v"]), None),
        (bias_of([None]), None),
        (bias_of([(0, 1), 2]), None),
        (bias_of([], kernel_tensors=None), None),  # a start
        (bias_of([], restored=["weight"]), None),  # the bias stays where it is, or there is none
    ],
)
def test_a_bias_that_does_not_stay_comes_with_an_update(monkeypatch, info, given):
    monkeypatch.setattr(reloading.layerwise, "get_layerwise_info", lambda layer: info)
    refused = pytest.raises(ValueError, match=f"qkv_proj: {given} of 3 parts of its bias were given")
    with nullcontext() if given is None else refused:
        check_bias_arrived(torch.nn.Linear(2, 2), "qkv_proj", 3)


class Checked(QuantizeMethodBase):
    """That of a layer with a weight and a bias, of which nothing becomes."""

    uses_meta_device = True

    def create_weights(self, layer):
        for name, shape in (("weight", (2, 2)), ("bias", (2,))):
            param = torch.nn.Parameter(torch.empty(shape), requires_grad=False)
            param.weight_loader = lambda param, loaded_weight: param.data.copy_(loaded_weight)
            layer.register_parameter(name, param)

    def apply(self, layer, x):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        check_bias_arrived(layer, "o_proj", 1)


def update(layer, **tensors):
    """As vLLM does."""
    reloading.layerwise.initialize_layerwise_reload(layer)
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor)
    reloading.layerwise.finalize_layerwise_processing(layer, None)


def test_vllm_keeps_the_bias_that_an_update_lacks_or_it_is_refused():
    layer = torch.nn.Module()
    layer.quant_method = Checked()
    layer.quant_method.create_weights(layer)
    reloading.layerwise.record_metadata_for_reloading(layer)
    update(layer, weight=torch.ones(2, 2), bias=torch.tensor([3.0, 4.0]))
    waits = "bias" in reloading.layerwise.get_layerwise_info(layer).restore_metadata[0]
    with pytest.raises(ValueError, match="0 of 1 parts of its bias") if waits else nullcontext():
        update(layer, weight=torch.zeros(2, 2))
    if not waits:
        assert layer.bias.tolist() == [3.0, 4.0]
        assert layer.weight.tolist() == [[0.0, 0.0], [0.0, 0.0]]
