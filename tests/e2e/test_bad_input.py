"""Bad input: the message names the key or the layer, what was given and what is allowed, and nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwantize_vllm.hessian import save_hessians

from .checkpoints import write_tiny

pytestmark = pytest.mark.e2e

KEYS = "allowed keys: ['scale_search', 'block_size', 'global_scale', 'hessian', 'ignore', 'strict', 'backend']"


def overrides(**settings: Any) -> dict[str, Any]:
    return {"hf_overrides": {"quantization_config": {"quant_method": "qwantize", **settings}}}


BAD_SETTINGS = {
    "block_size": (overrides(block_size=24), ["block_size (from the checkpoint", "got 24, allowed: 16 or 32"]),
    "scale_search": (
        overrides(scale_search="optimum"),
        ["scale_search (from", "got 'optimum', allowed: 'naive', 'optimal' or 'hessian'", "Did you mean 'optimal'?"],
    ),
    "type": (overrides(strict="yes"), ["strict (from", "got 'yes'", "a valid boolean"]),
    "unknown key": (overrides(blocksize=16), ["unknown key 'blocksize' (from", KEYS, "Did you mean 'block_size'?"]),
    "hessian without a file": (
        overrides(scale_search="hessian"),
        ["scale_search 'hessian' needs the key hessian", "path of a block-Hessian file"],
    ),
    "hessian file missing": (
        overrides(scale_search="hessian", hessian="nowhere.safetensors"),
        ["hessian: there is no file nowhere.safetensors"],
    ),
    "regular expression": (overrides(ignore=["re:("]), ["ignore (from", "'re:(' is not a regular expression"]),
    "additional_config": (
        {"additional_config": {"qwantize": {"block_size": "16"}}},
        ["block_size (from --additional-config): got '16', allowed: 16 or 32"],
    ),
    "additional_config not a mapping": (
        {"additional_config": {"qwantize": "naive"}},
        ["qwantize settings from --additional-config must be a mapping", "got 'naive'"],
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting(engines, tiny, case):
    arguments, fragments = BAD_SETTINGS[case]
    assert_refused(engines.refuse(tiny, **arguments), fragments)


@pytest.mark.parametrize("route", ["hf_overrides", "variable"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "settings.yaml does not exist"),
        (b"scale_search: [naive", "settings.yaml is not YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "settings.yaml is not YAML"),
        (b"- naive", "settings.yaml must hold a mapping such as 'scale_search: optimal', got list"),
        (b"block_size: 24", "got 24, allowed: 16 or 32"),
    ],
    ids=["missing", "not YAML", "not text", "not a mapping", "bad value"],
)
def test_bad_settings_file(engines, tiny, tmp_path, route, content, message):
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_bytes(content)
    if route == "variable":
        log = engines.refuse(tiny, env={"QWANTIZE_CONFIG": str(file)})
    else:
        log = engines.refuse(tiny, hf_overrides={"quantization_config_file": str(file)})
    assert_refused(log, [message])


def assert_refused(log: str, fragments: list[str]) -> None:
    """The log holds the message, and vLLM had not begun to read weights."""
    for fragment in fragments:
        assert fragment in log, log[-3000:]
    assert "Loading safetensors" not in log


def test_nan_and_infinity(engines, broken):
    message = "qwantize: model.layers.1.mlp.gate_up_proj: weight (512, 128) holds 3 NaN and 2 infinite elements"
    assert message in engines.refuse(broken)


def test_infinity_alone(engines, tmp_path):
    def break_weight(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_proj.weight"][1, 1] = -torch.inf

    log = engines.refuse(write_tiny(tmp_path / "broken", break_weight))
    assert "qwantize: model.layers.0.self_attn.qkv_proj: weight (256, 128) holds 0 NaN and 1 infinite elements" in log


DOWN = "model.layers.0.mlp.down_proj"  # 16 blocks of 16, and the first layer of the file
BAD_HESSIANS = {
    "no such layer": ({"model.layers.7.mlp.down_proj": 16}, 16, f"hessians.safetensors has no layer '{DOWN}'"),
    "other block size": ({DOWN: 8}, 32, "was measured with block_size 32, the settings ask for 16"),
    "too few blocks": ({DOWN: 15}, 16, f"layer '{DOWN}' has 15 blocks, needed 16"),
}


@pytest.mark.parametrize("case", BAD_HESSIANS)
def test_bad_hessian_file(engines, tiny, tmp_path, case):
    layers, block_size, message = BAD_HESSIANS[case]
    path = tmp_path / "hessians.safetensors"
    hessians = {name: torch.eye(block_size).repeat(blocks, 1, 1) for name, blocks in layers.items()}
    save_hessians(path, hessians, block_size)
    assert message in engines.refuse(tiny, **overrides(scale_search="hessian", hessian=str(path)))
