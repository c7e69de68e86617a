"""New weights into an engine whose CUDA graphs read the old ones: experts, latent attention, and layers in
the layout of Marlin.

Run with vLLM's CUDA build: pytest -m gpu -n 2 tests/gpu/test_reload.py
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.checkpoints import write_tiny
from tests.e2e.moe_checkpoints import DEEPSEEK, QWEN3, write_moe
from tests.e2e.probe import generate
from tests.e2e.test_reload import flip
from tests.gpu.engine import NEEDS_VLLM, result_of

PROMPTS = [[1, 5, 9, 30], [7], list(range(3, 90))]
# Tensors that kernels find on a layer and that are no parameters, so that vLLM would not put them back.
SCRATCH = ("workspace", "weight_arrived", "W_UV", "W_UK_T")

pytestmark = [
    pytest.mark.gpu,
    NEEDS_VLLM,
]


def state(llm: Any) -> dict[str, Any]:
    """What the engine says, and what it holds where."""
    llm.reset_prefix_cache()
    ids = [each["ids"] for each in generate(llm, PROMPTS, 24)]
    return {"ids": ids, **llm.apply_model(held)[0]}


def held(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Bytes of every parameter; addresses of them and of scratch."""
    parameters = dict(model.named_parameters())
    scratch = {
        f"{name}.{key}": getattr(layer, key)
        for name, layer in model.named_modules()
        for key in SCRATCH
        if isinstance(getattr(layer, key, None), torch.Tensor)
    }
    return {
        "bytes": {name: each.detach().reshape(-1).view(torch.uint8).cpu() for name, each in parameters.items()},
        "addresses": {name: each.data_ptr() for name, each in (parameters | scratch).items()},
    }


def reload(llm: Any, other: str) -> dict[str, Any]:
    states = {"before": state(llm)}
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    return {**states, "after": state(llm)}


def assert_reloads(folder: Path, old: Path, new: Path, settings: dict[str, Any]) -> list[str]:
    """What is served after a reload is what a fresh start serves, from where it was. Returns the names of what is
    held."""
    graphs = {"enforce_eager": False, "max_num_seqs": 8}  # few graphs
    use = functools.partial(reload, other=str(new))
    reloaded = result_of(use, folder / "reloaded", old, settings, **graphs)
    fresh = result_of(state, folder / "fresh", new, settings, **graphs)
    before, after = reloaded["before"], reloaded["after"]
    assert after["bytes"].keys() == fresh["bytes"].keys()
    differ = [name for name, each in fresh["bytes"].items() if not torch.equal(after["bytes"][name], each)]
    assert not differ
    moved = [name for name, address in before["addresses"].items() if after["addresses"].get(name) != address]
    assert not moved
    assert after["ids"] == fresh["ids"] != before["ids"]
    return list(before["addresses"])


def ending(names: list[str], end: str) -> int:
    return sum(name.endswith(end) for name in names)


def test_experts(tmp_path: Path) -> None:
    old, new = (write_moe(tmp_path / str(seed), QWEN3, seed) for seed in (0, 1))
    names = assert_reloads(tmp_path, old, new, {})
    assert ending(names, ".w13_weight_scale") == ending(names, ".w2_weight_scale") == 2
    assert ending(names, ".weight_arrived") == 2 * 2  # qkv and o of each layer


def test_latent_attention(tmp_path: Path) -> None:
    """vLLM 0.25.1 takes `kv_b_proj` apart into new tensors at each load: the first ones are in the graphs."""
    old, new = (write_moe(tmp_path / str(seed), DEEPSEEK, seed) for seed in (0, 1))
    names = assert_reloads(tmp_path, old, new, {})
    layers = DEEPSEEK["num_hidden_layers"]
    assert ending(names, ".W_UV") == ending(names, ".W_UK_T") == layers


def test_layers_of_marlin(tmp_path: Path) -> None:
    """vLLM 0.25.1 makes a workspace whenever it prepares a layer: the first one is in the graphs."""
    old, new = write_tiny(tmp_path / "old"), write_tiny(tmp_path / "new", flip)
    names = assert_reloads(tmp_path, old, new, {"backend": "marlin"})
    assert ending(names, ".workspace") == ending(names, ".weight_scale") == 4 * 2  # four of each layer
