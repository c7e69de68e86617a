"""`global_scale: amax_per_member`: a fused layer serves what its members are on their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4

from .checkpoints import linear_layers
from .compare import assert_agree, served_layers, tensors_of

pytestmark = pytest.mark.e2e


@dataclasses.dataclass(frozen=True)
class Members:
    """The members of a fused layer, each quantized with its own global scale."""

    parts: list[Nvfp4Tensor]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([part.dequantize(dtype) for part in self.parts])


def test_members_keep_their_own_global_scales(engines, tiny):
    overrides = {"quantization_config": {"quant_method": "qwantize", "global_scale": "amax_per_member"}}
    ours = engines.start(tiny, hf_overrides=overrides)
    tensors = load_file(tiny / "model.safetensors")
    expected = {
        layer: Members([quantize_nvfp4(tensors[f"{member}.weight"]) for member in members])
        for layer, members in linear_layers(tensors).items()
    }
    assert served_layers(ours) == set(expected)
    served = tensors_of(ours)
    for layer, members in expected.items():
        scales = torch.stack([part.global_scale for part in members.parts])
        assert torch.equal(served[f"{layer}.weight"], torch.cat([part.codes for part in members.parts]))
        assert torch.equal(served[f"{layer}.weight_global_scale"], scales if len(scales) > 1 else scales[0])
    theirs = engines.start_dequantized(tiny, expected, ours)
    assert_agree(ours, theirs, 0.05)
