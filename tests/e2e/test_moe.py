"""Mixtures of experts: quantized expert by expert, served from codes, the same as their dequantized checkpoints."""

from __future__ import annotations

import pytest
import torch

from .checkpoints import quantize_checkpoint
from .compare import assert_agree, assert_serves, served_layers, tensors_of
from .moe_checkpoints import DEEPSEEK, MIXTRAL, QWEN3, mixture_layers, stacked, write_moe

pytestmark = pytest.mark.e2e
MODELS = {"mixtral": MIXTRAL, "qwen3": QWEN3, "deepseek": DEEPSEEK}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_that_of_its_dequantized_checkpoint(engines, tmp_path, name):
    config = MODELS[name]
    checkpoint = write_moe(tmp_path / "checkpoint", config)
    expected = quantize_checkpoint(checkpoint, torch.float32)
    ours = engines.start(checkpoint, dtype="float32")  # in which no rounding decides who computes
    held = tensors_of(ours)
    experts = {layer for layer in expected if ".experts." in layer}
    assert served_layers(ours) == set(expected) - experts
    for layer in expected.keys() - experts:
        assert_serves(held, layer, expected[layer])
    for mixture in mixture_layers(config):
        for weight, q in stacked(config, expected, mixture).items():
            at = f"{mixture}.experts.routed_experts.{weight}_weight"
            assert torch.equal(held[at], q.codes)
            assert torch.equal(held[f"{at}_scale"].view(torch.uint8), q.block_scales.view(torch.uint8))
            assert torch.equal(held[f"{at}_global_scale"], q.global_scale[:, None])
    theirs = engines.start_dequantized(checkpoint, expected, ours, dtype="float32")
    assert_agree(ours, theirs, 1e-4)
