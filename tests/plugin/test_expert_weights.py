"""What becomes of a layer's experts besides their tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from qwantize_vllm.plugin import expert_weights
from qwantize_vllm.plugin.expert_weights import GroupedForm
from tests.plugin.test_expert_balancing import EXPERTS, HIDDEN, INNER, layer_of, quantize


def test_kernels_are_prepared_of_what_will_be_served(kernel_on, monkeypatch):
    prepared = []
    monkeypatch.setattr(expert_weights, "prepare_kernels", prepared.append)
    experts = quantize(16, kernel_on)
    layer = layer_of(GroupedForm(experts), experts)
    (kernels,) = prepared
    assert kernels.w13.total == kernels.w2.total == 2 * EXPERTS, "with those of the other rank"
    assert (kernels.w13.shape, kernels.w2.shape) == ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    assert (kernels.top_k, kernels.dtype, kernels.activation) == (2, torch.bfloat16, "silu")
    assert kernels.w13.words.data_ptr() == layer.w13_weight.data_ptr(), "no copy is held"
