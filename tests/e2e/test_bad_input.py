"""Bad input: the message names the key or the layer, what was given and what is allowed, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwantize_vllm.hessian import save_hessians

from .checkpoints import random_hessians, write_tiny
from .conftest import Engines
from .moe_checkpoints import QWEN3, write_moe

pytestmark = pytest.mark.e2e

KEYS = (
    "allowed keys: ['scale_search', 'block_size', 'global_scale', 'hessian', 'refine', 'gptq_damping', 'gptq_order', "
    "'gptq_sweeps', 'ignore', 'cache_dir', 'towers', 'quantize_gates', 'fuse_norms', 'strict', 'backend']"
)


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
    "cache_dir in a checkpoint": (overrides(cache_dir="/tmp"), ["cache_dir is not taken from a checkpoint"]),
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


def test_batch_invariance_by_a_backend_that_cannot_give_it(engines, tiny):
    log = engines.refuse(tiny, env={"VLLM_BATCH_INVARIANT": "1"}, additional_config={"qwantize": {"backend": "fused"}})
    assert_refused(log, ["VLLM_BATCH_INVARIANT=1 asks for results that do not depend on the batch", "backend 'fused'"])


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


def lacks(*lacking: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """For write_tiny: leaves out tensors by their names."""

    def leave_out(tensors: dict[str, torch.Tensor]) -> None:
        for name in lacking:
            del tensors[name]

    return leave_out


def test_a_layer_that_the_checkpoint_lacks(engines, tmp_path):
    """vLLM would give it memory that nobody has written."""
    o_proj = "model.layers.1.self_attn.o_proj"
    checkpoint = write_tiny(tmp_path / "without", lacks(f"{o_proj}.weight"))
    log = engines.refuse(checkpoint)
    assert f"qwantize: {o_proj}: the checkpoint has no weight for it, or" in log
    assert f"; give {o_proj} (on this rank)" in log
    assert "name the layer in the setting ignore" in log


def test_a_fused_layer_that_the_checkpoint_lacks(engines, tmp_path):
    mlp = "model.layers.0.mlp"
    checkpoint = write_tiny(tmp_path / "without", lacks(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"))
    log = engines.refuse(checkpoint)
    assert f"qwantize: {mlp}.gate_up_proj: the checkpoint has no weight for it, or" in log
    assert f"; give {mlp}.gate_proj, {mlp}.up_proj (on this rank)" in log


def test_experts_that_the_checkpoint_lacks(engines, tmp_path):
    checkpoint = write_moe(tmp_path / "whole", QWEN3)
    file = checkpoint / "model.safetensors"
    kept = {name: each for name, each in load_file(file).items() if ".layers.1.mlp.experts." not in name}
    save_file(kept, file)
    log = engines.refuse(checkpoint, dtype="float32")
    assert "qwantize: model.layers.1.mlp.experts: the checkpoint has no weight for it, or" in log
    assert "; give gate, up and down of all experts (on this rank)" in log


DOWN = "model.layers.0.mlp.down_proj"  # 16 blocks of 16


def remove(hessians: dict[str, torch.Tensor]) -> None:
    del hessians[DOWN]


def shorten(hessians: dict[str, torch.Tensor]) -> None:
    hessians[DOWN] = hessians[DOWN][:15]


def lengthen(hessians: dict[str, torch.Tensor]) -> None:
    hessians[DOWN] = torch.cat([hessians[DOWN]] * 2)


UNFIT_HESSIANS = {
    "no such layer": (remove, f"hessians.safetensors has no layer '{DOWN}'"),
    "too few blocks": (shorten, f"layer '{DOWN}' has 15 blocks, the model's has 16"),
    "too many blocks": (lengthen, f"layer '{DOWN}' has 32 blocks, the model's has 16"),
}


@pytest.mark.parametrize("case", UNFIT_HESSIANS)
def test_unfit_hessian_file(engines, tiny, tmp_path, case):
    change, message = UNFIT_HESSIANS[case]
    hessians = random_hessians(tiny)
    change(hessians)
    assert_refused(refuse_hessians(engines, tiny, tmp_path, hessians), [message])


def test_hessian_file_of_another_block_size(engines, tiny, tmp_path):
    log = refuse_hessians(engines, tiny, tmp_path, {DOWN: torch.eye(32).repeat(8, 1, 1)}, block_size=32)
    assert_refused(log, ["was measured with block_size 32, the settings ask for 16"])


def test_nan_in_a_hessian(engines, tiny, tmp_path):
    hessians = random_hessians(tiny)
    hessians[DOWN][3, 2, 1] = torch.nan
    message = f"layer '{DOWN}' holds 1 non-finite elements"
    assert message in refuse_hessians(engines, tiny, tmp_path, hessians)


def refuse_hessians(
    engines: Engines, tiny: Path, tmp_path: Path, hessians: dict[str, torch.Tensor], block_size: int = 16
) -> str:
    path = tmp_path / "hessians.safetensors"
    save_hessians(path, hessians, block_size)
    return engines.refuse(tiny, **overrides(scale_search="hessian", hessian=str(path), strict=True))
