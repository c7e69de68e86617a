"""`reload_weights`: fresh weights into a running engine, quantized on the way as the first were."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import quantize_checkpoint, write_tiny
from .compare import assert_serves
from .conftest import TINY_PROMPTS
from .probe import probe

pytestmark = pytest.mark.e2e


def reload_twice(llm: Any, other: str) -> list[dict[str, Any]]:
    """What the engine holds and says at first, after a reload, and after a reload from another checkpoint."""
    states = [state(llm)]
    llm.collective_rpc("reload_weights")
    states.append(state(llm))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    states.append(state(llm))
    return states


def state(llm: Any) -> dict[str, Any]:
    llm.reset_prefix_cache()
    return {**probe(llm, TINY_PROMPTS), "addresses": llm.apply_model(addresses)[0]}


def addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights: its linear layers upside down."""

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                tensors[name] = tensor.flip(0).contiguous()

    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "other", flip)


def test_reload(engines, tiny, other):
    """One layer is ignored: vLLM reloads it its own way."""
    ignored = "model.layers.0.self_attn.o_proj"
    overrides = {"quantization_config": {"quant_method": "qwantize", "ignore": [ignored]}}
    outcome = engines.start(tiny, functools.partial(reload_twice, other=str(other)), hf_overrides=overrides)
    first, same, changed = outcome.result
    for states, checkpoint in ((first, tiny), (same, tiny), (changed, other)):
        for layer, q in quantize_checkpoint(checkpoint, skip=[ignored]).items():
            assert_serves(states["models"][0]["tensors"], layer, q)
    assert same["completions"] == first["completions"]
    assert same["own_scores"] == first["own_scores"]
    assert changed["own_scores"] != first["own_scores"]
    # CUDA graphs read the weights where they were when the graphs were captured.
    assert first["addresses"] == same["addresses"] == changed["addresses"]
    summaries = [line.partition("summary: ")[2] for line in outcome.lines("qwantize summary:")]
    assert len(summaries) == 3
    for summary in summaries:
        assert "7 layers quantized" in summary
        assert "3 left (2 embedding or head, 1 ignored)" in summary
