"""`scale_search: hessian`, served from a file of block Hessians."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm.hessian import save_hessians

from .checkpoints import quantize_checkpoint, random_hessians
from .compare import assert_serves, served_layers, tensors_of

pytestmark = pytest.mark.e2e

FILE_NAMES = {
    "fused names": lambda layer: layer,
    # What a calibration of the checkpoint's own layers writes: any member stands for the fused layer.
    "member names": lambda layer: layer.replace("qkv_proj", "v_proj").replace("gate_up_proj", "gate_proj"),
}


@pytest.mark.parametrize("names", FILE_NAMES)
def test_codes_are_those_of_the_hessian_search(engines, tiny, tmp_path, names):
    hessians = random_hessians(tiny)
    path = tmp_path / "hessians.safetensors"
    save_hessians(path, {FILE_NAMES[names](layer): hessian for layer, hessian in hessians.items()}, block_size=16)
    settings = {"quant_method": "qwantize", "scale_search": "hessian", "hessian": str(path)}
    outcome = engines.start(tiny, hf_overrides={"quantization_config": settings})

    expected = quantize_checkpoint(tiny, hessians=hessians, scale_search="hessian")
    assert served_layers(outcome) == set(expected)
    for layer, q in expected.items():
        assert_serves(tensors_of(outcome), layer, q)
    plain = quantize_checkpoint(tiny)
    assert any(not torch.equal(q.codes, plain[layer].codes) for layer, q in expected.items())
