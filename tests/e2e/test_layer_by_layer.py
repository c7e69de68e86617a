"""While a checkpoint loads, at most one dense linear layer exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .checkpoints import TINY_LAYERS
from .compare import served_layers
from .probe import describe_model

pytestmark = pytest.mark.e2e

DENSE_AT_EACH_STEP: list[int] = []  # of the engine's process


def watch_quantization() -> None:
    """Note, whenever a layer is about to be quantized, how many layers hold a dense weight."""
    from qwantize_vllm.plugin.linear import QwantizeLinearMethod as Method

    layers: list[torch.nn.Module] = []
    create, process = Method.create_weights, Method.process_weights_after_loading

    def watched_create(self: Any, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        create(self, layer, *args, **kwargs)
        layers.append(layer)

    def watched_process(self: Any, layer: torch.nn.Module) -> None:
        if layer.weight.dtype != torch.uint8:
            DENSE_AT_EACH_STEP.append(sum(is_dense(each.weight) for each in layers))
        process(self, layer)

    Method.create_weights, Method.process_weights_after_loading = watched_create, watched_process


def is_dense(weight: torch.Tensor) -> bool:
    return weight.dtype != torch.uint8 and weight.device.type != "meta"


def what_was_seen(llm: Any) -> dict[str, Any]:
    return {"dense": DENSE_AT_EACH_STEP, "models": llm.apply_model(describe_model)}


def test_one_dense_layer_at_a_time(engines, tiny):
    outcome = engines.start(tiny, what_was_seen, before=watch_quantization)
    assert len(served_layers(outcome)) == 4 * TINY_LAYERS
    assert outcome.result["dense"] == [1] * (4 * TINY_LAYERS)
