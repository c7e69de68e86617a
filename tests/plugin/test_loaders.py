"""Which layers are wrapped again when another one is made: the one before it, of the same model, while nothing came."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.model_loader.reload import layerwise

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.plugin.loaders import wrap_loaders
from qwantize_vllm.plugin.report import LoadReport


def load(param, loaded_weight):
    param.data.copy_(loaded_weight)


def new_layer(report):
    layer = torch.nn.Module()
    layer.register_parameter("weight", torch.nn.Parameter(torch.empty(2, 2, device="meta"), requires_grad=False))
    layer.weight.weight_loader = load
    wrap_loaders(layer, report)
    return layer


def test_a_loader_given_later_is_wrapped_as_the_next_layer_is_made():
    report = LoadReport(QwantizeSettings())
    first = new_layer(report)
    first.weight.weight_loader = load
    new_layer(report)
    assert first.weight.weight_loader is not load


def test_layers_of_other_models_are_left_alone():
    first = new_layer(LoadReport(QwantizeSettings()))
    first.weight.weight_loader = load
    new_layer(LoadReport(QwantizeSettings()))
    assert first.weight.weight_loader is load


def test_layers_that_were_loaded_are_left_alone():
    """As the last one of a model when its draft layers are made."""
    report = LoadReport(QwantizeSettings())
    first = new_layer(report)
    layerwise.get_layerwise_info(first).reset()
    first.weight.weight_loader = load
    new_layer(report)
    assert first.weight.weight_loader is load
