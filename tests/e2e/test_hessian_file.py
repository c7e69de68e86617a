"""`scale_search: hessian`, served from a file of block Hessians."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm.hessian import HessianInfo, save_hessians

from .checkpoints import quantize_checkpoint, random_hessians
from .compare import assert_serves, served_layers, tensors_of

pytestmark = pytest.mark.e2e

FILE_NAMES = {
    "fused names": lambda layer: layer,
    # What a calibration of the checkpoint's own layers writes: any member stands for the fused layer.
    "member names": lambda layer: layer.replace("qkv_proj", "v_proj").replace("gate_up_proj", "gate_proj"),
}


REFINES = ("codes", "gptq")


@pytest.mark.parametrize("refine", REFINES)
def test_refined_codes_are_served_from_full_hessians(engines, tiny, tmp_path, refine):
    full, blocks = random_hessians(tiny, full=True), random_hessians(tiny)
    path = tmp_path / "hessians.safetensors"
    save_hessians(path, full, 16, HessianInfo(block_size=16, full=True))
    search = {"scale_search": "hessian", "refine": refine}
    settings = {"quant_method": "qwantize", **search, "hessian": str(path), "strict": True}
    outcome = engines.start(tiny, hf_overrides={"quantization_config": settings})

    expected = quantize_checkpoint(tiny, hessians=full if refine == "gptq" else blocks, **search)
    plain = quantize_checkpoint(tiny, hessians=blocks, scale_search="hessian")
    assert served_layers(outcome) == set(expected)
    for layer, q in expected.items():
        served = tensors_of(outcome)[f"{layer}.weight"]
        # With gptq a product of another number of threads may round otherwise, and all that follows with it.
        assert (served == q.codes).float().mean() > (0.95 if refine == "gptq" else 0.9999)
        assert (served == plain[layer].codes).float().mean() < 0.9


def test_gptq_refuses_a_file_of_blocks(engines, tiny, tmp_path):
    path = tmp_path / "hessians.safetensors"
    save_hessians(path, random_hessians(tiny), block_size=16)
    settings = {"quant_method": "qwantize", "scale_search": "hessian", "refine": "gptq", "hessian": str(path)}
    log = engines.refuse(tiny, hf_overrides={"quantization_config": settings})
    assert "has the blocks of the Hessians only; refine: gptq needs all of them" in log


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
