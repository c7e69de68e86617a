"""What test_two_gpus.py compares by: swizzled layers and experts, back in plain layouts. Needs no GPU."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4
from qwantize_vllm.plugin.expert_weights import GroupedForm, QuantizedExperts
from qwantize_vllm.plugin.weights import QuantizedLayer, SwizzledForm
from tests.numbers import make_weight

from .plain import plain_tensors


def of_shape(*shape: int, seed: int) -> Nvfp4Tensor:
    rows = torch.Size(shape[:-1]).numel()
    return quantize_nvfp4(make_weight("gaussian", rows, shape[-1], torch.bfloat16, seed=seed).view(shape))


def model_with(name: str, form: Any, quantized: Any, **attributes: Any) -> torch.nn.Module:
    layer = torch.nn.Module()
    for key in ("weight", "w13_weight", "w2_weight"):  # what `keep` replaces
        layer.register_parameter(key, torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    for key, value in attributes.items():
        setattr(layer, key, value)
    form.keep(layer, quantized)
    layer.quant_method = types.SimpleNamespace(_form=form)
    return torch.nn.ModuleDict({name: layer})


def assert_holds(tensors: dict[str, torch.Tensor], name: str, q: Nvfp4Tensor) -> None:
    assert torch.equal(tensors[name], q.codes)
    assert torch.equal(tensors[f"{name}_scale"].view(torch.uint8), q.block_scales.view(torch.uint8))
    assert torch.equal(tensors[f"{name}_global_scale"], q.global_scale)


def test_a_linear_layer() -> None:
    q = of_shape(70, 96, seed=0)
    quantized = QuantizedLayer.of([q], torch.bfloat16)
    model = model_with("o_proj", SwizzledForm(quantized, fuse_norms=False), quantized, input_size_per_partition=96)
    assert_holds(plain_tensors(model)["tensors"], "o_proj.weight", q)


def test_experts() -> None:
    w13, w2 = of_shape(3, 1, 2 * 48, 80, seed=1), of_shape(3, 1, 80, 48, seed=2)
    quantized = QuantizedExperts(w13, w2, torch.bfloat16)
    moe = types.SimpleNamespace(experts_per_token=2)
    of_model = {"moe_config": moe, "activation": MoEActivation.SILU, "global_num_experts": 3}
    tensors = plain_tensors(model_with("experts", GroupedForm(quantized), quantized, **of_model))["tensors"]
    for name, q in {"w13": w13, "w2": w2}.items():
        one_each = Nvfp4Tensor(q.codes[:, 0], q.block_scales[:, 0], q.global_scale[:, 0], q.block_size)
        assert_holds(tensors, f"experts.{name}_weight", one_each)
