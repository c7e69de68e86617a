"""Which quantized checkpoints are ours, and which are refused by name."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import OffloadConfig

from qwantize_vllm.checkpoint import LAYOUTS
from qwantize_vllm.plugin import invariance, packed
from qwantize_vllm.plugin.config import QwantizeConfig
from qwantize_vllm.plugin.packed import PackedConfig
from qwantize_vllm.plugin.packed_format import packed_of
from qwantize_vllm.plugin.packed_tensors import members_kept

CT = LAYOUTS["compressed-tensors"].config(["lm_head"], 16)
MODELOPT = LAYOUTS["modelopt"].config(["lm_head"], 16)
OLD_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}


def group(**change):
    (given,) = CT["config_groups"].values()
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {**given, **change}}}


ACTIVATIONS = group(input_activations={"num_bits": 4, "type": "float"})
OURS = {
    "compressed-tensors": (CT, "compressed-tensors", False),
    "compressed-tensors W4A4": (ACTIVATIONS, "compressed-tensors", True),
    "modelopt": (MODELOPT, "modelopt", False),
    "modelopt W4A4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt", True),
    "hf_quant_config.json": (OLD_MODELOPT, "modelopt", True),
    "NVFP4 by name, weights by its groups": ({**MODELOPT, "quant_algo": "NVFP4"}, "modelopt", False),
    "own": (LAYOUTS["qwantize"].config([], 32), "qwantize", False),
}
ATTENTION = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8, "type": "float"}}
OURS["with a group for attention"] = (
    {**CT, "config_groups": {**CT["config_groups"], "group_1": ATTENTION}},
    "compressed-tensors",
    False,
)


def rotated(*locations):
    apply = [{"targets": ["Linear"], "location": location} for location in locations]
    return {**CT, "transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": apply}}}}


OURS["with transforms of weights"] = (rotated("weight_input", "weight_output"), "compressed-tensors", False)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
OTHERS = {
    "awq": ({"quant_method": "awq", "bits": 4}, "by awq"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "by gptq"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "by fp8"),
    "ct int4": (group(weights=INT4), r"by compressed-tensors with int4 \(group\) weights"),
    "ct transforms": (rotated("input", "weight_input"), r"compressed-tensors with transforms of activations \(input\)"),
    "ct nothing": ({"quant_method": "compressed-tensors"}, "by compressed-tensors with no weights"),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "by ModelOpt FP8"),
    "modelopt mixed": ({"quant_method": "modelopt_mixed", "quant_algo": "MIXED_PRECISION"}, "ModelOpt MIXED_PRECISION"),
}


@pytest.mark.parametrize("case", OURS)
def test_nvfp4_checkpoints_are_ours(case):
    config, layout, activations = OURS[case]
    packed = packed_of(config)
    assert (packed.layout.name, packed.activations) == (layout, activations)
    assert packed.block_size == (32 if case == "own" else 16)
    made = QwantizeConfig.from_config(config)
    assert isinstance(made, PackedConfig)
    assert pickle.loads(pickle.dumps(made)).packed == packed


def running_with(backend):
    return SimpleNamespace(
        additional_config={"qwantize": {"backend": backend}},
        load_config=None,
        model_config=SimpleNamespace(hf_overrides={}),
        offload_config=OffloadConfig(),
    )


@pytest.mark.parametrize("backend", ["vllm", "marlin", "humming"])
def test_kernels_of_vllm_refuse_a_checkpoint_with_blocks_of_32(backend, monkeypatch):
    """Of experts too, which are not built by then."""
    running = running_with(backend)
    monkeypatch.setattr(packed, "get_current_vllm_config", lambda: running)
    monkeypatch.delenv("QWANTIZE_CONFIG", raising=False)
    config = QwantizeConfig.from_config(LAYOUTS["qwantize"].config([], 32))
    with pytest.raises(ValueError, match=f"backend '{backend}' takes blocks of 16, block_size is 32"):
        _ = config.settings


def test_a_backend_that_is_not_batch_invariant_is_refused(monkeypatch):
    running = running_with("marlin")
    monkeypatch.setattr(packed, "get_current_vllm_config", lambda: running)
    monkeypatch.setattr(packed, "_look_at_files", lambda config, strict: None)
    monkeypatch.setattr(invariance.envs, "VLLM_BATCH_INVARIANT", True)
    monkeypatch.delenv("QWANTIZE_CONFIG", raising=False)
    config = QwantizeConfig.from_config(LAYOUTS["qwantize"].config([], 16))
    with pytest.raises(ValueError, match=r"VLLM_BATCH_INVARIANT=1 .* backend 'marlin' does not give"):
        _ = config.settings


def test_a_reload_may_not_need_more_global_scales_than_there_are():
    kept = [members_kept("qkv_proj", "its members", *each) for each in ((1, 0), (1, 1), (1, 3), (3, 0))]
    assert kept == [1, 1, 3, 3]
    with pytest.raises(ValueError, match="qkv_proj: its members have different global scales in the weights that are"):
        members_kept("qkv_proj", "its members", 3, 1)


@pytest.mark.parametrize("case", OTHERS)
def test_others_are_refused_by_name(case):
    config, message = OTHERS[case]
    with pytest.raises(ValueError, match=f"quantized already, {message}|quantized already, by {message}"):
        QwantizeConfig.override_quantization_method(config, "qwantize", hf_config=None)
    assert QwantizeConfig.override_quantization_method(config, None) is None  # not asked for
    assert QwantizeConfig.override_quantization_method(config, "awq") is None


def test_only_what_is_asked_for_is_taken_over():
    assert QwantizeConfig.override_quantization_method(CT, "qwantize", hf_config=None) == "qwantize"
    assert QwantizeConfig.override_quantization_method(CT, None, hf_config=None) is None
    assert QwantizeConfig.override_quantization_method(None, "qwantize") is None
    assert QwantizeConfig.override_quantization_method({"quant_method": "qwantize"}, "qwantize") is None


def test_vllm_accepts_what_is_written():
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    theirs = CompressedTensorsConfig.from_config(LAYOUTS["compressed-tensors"].config(["lm_head"], 16))
    assert theirs._is_nvfp4_format(theirs.target_scheme_map["Linear"]["weights"])
    assert theirs.target_scheme_map["Linear"].get("input_activations") is None
    files = LAYOUTS["modelopt"].extra_files(MODELOPT)
    for config in (dict(MODELOPT), files["hf_quant_config.json"]):
        theirs = ModelOptNvFp4Config.from_config(config)
        assert theirs.quant_method == "W4A16_NVFP4"
        assert theirs.is_layer_excluded("lm_head")
        assert not theirs.is_layer_excluded("model.layers.0.mlp.down_proj")
    assert ModelOptNvFp4Config.override_quantization_method(MODELOPT, None) == "modelopt_fp4"
