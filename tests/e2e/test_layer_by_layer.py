"""While a checkpoint loads, at most one dense linear layer, or the experts of one layer, exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .checkpoints import QWEN2, TINY_LAYERS, write_tiny
from .compare import served_layers
from .moe_checkpoints import QWEN3, write_moe
from .probe import describe_model

pytestmark = pytest.mark.e2e

# Of the engine's process.
DENSE_AT_EACH_STEP: list[int] = []
ORDER: list[str] = []


def watch_quantization() -> None:
    """Note, whenever a layer is about to be quantized, how many layers hold a dense weight."""
    from qwantize_vllm.plugin.linear import QwantizeLinearMethod
    from qwantize_vllm.plugin.moe import QwantizeMoEMethod

    layers: list[torch.nn.Module] = []
    for method in (QwantizeLinearMethod, QwantizeMoEMethod):
        watch(method, layers)


def watch(method: Any, layers: list[torch.nn.Module]) -> None:
    create, process = method.create_weights, method.process_weights_after_loading

    def watched_create(self: Any, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        create(self, layer, *args, **kwargs)
        layers.append(layer)

    def watched_process(self: Any, layer: torch.nn.Module) -> None:
        if weight_of(layer).dtype != torch.uint8:
            DENSE_AT_EACH_STEP.append(sum(is_dense(weight_of(each)) for each in layers))
            ORDER.append(self.name)
        process(self, layer)

    method.create_weights, method.process_weights_after_loading = watched_create, watched_process


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    return layer.w13_weight if hasattr(layer, "w13_weight") else layer.weight


def is_dense(weight: torch.Tensor) -> bool:
    return weight.dtype != torch.uint8 and weight.device.type != "meta"


def what_was_seen(llm: Any) -> dict[str, Any]:
    return {"dense": DENSE_AT_EACH_STEP, "order": ORDER, "models": llm.apply_model(describe_model)}


def test_one_dense_layer_at_a_time(engines, tiny):
    outcome = engines.start(tiny, what_was_seen, before=watch_quantization)
    assert len(served_layers(outcome)) == 4 * TINY_LAYERS
    assert outcome.result["dense"] == [1] * (4 * TINY_LAYERS)


def test_the_experts_of_one_layer_at_a_time(engines, tmp_path):
    checkpoint = write_moe(tmp_path / "checkpoint", QWEN3)
    outcome = engines.start(checkpoint, what_was_seen, before=watch_quantization)
    assert outcome.result["dense"] == [1] * (3 * TINY_LAYERS)  # qkv, o and the experts


def test_a_layer_whose_bias_comes_first_does_not_wait_for_the_end(engines, tmp_path):
    """As in files sorted by name; the layers of such a file come one after the other, and so they are quantized."""
    checkpoint = write_tiny(tmp_path / "checkpoint", **QWEN2)
    outcome = engines.start(checkpoint, what_was_seen, before=watch_quantization)
    order = outcome.result["order"]
    assert len(order) == 4 * TINY_LAYERS
    assert order == sorted(order, key=lambda name: int(name.split(".")[2]))
    assert outcome.result["dense"] == [1] * len(order)


def give_another_loader() -> None:
    """As MambaMixer2 does once it has made a projection."""
    from vllm.model_executor.models.llama import LlamaAttention

    make = LlamaAttention.__init__

    def make_and_give(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        projection = self.o_proj

        def load(param: torch.nn.Parameter, loaded: torch.Tensor) -> None:
            projection.weight_loader_v2(param, loaded)

        projection.weight.weight_loader = load

    LlamaAttention.__init__ = make_and_give  # type: ignore[method-assign]


def test_a_layer_that_gets_another_loader_is_quantized_as_it_loads(engines, tiny):
    watch_both = functools.partial(run_both, give_another_loader, watch_quantization)
    outcome = engines.start(tiny, what_was_seen, before=watch_both)
    assert len(served_layers(outcome)) == 4 * TINY_LAYERS
    assert outcome.result["dense"] == [1] * (4 * TINY_LAYERS)


def run_both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first(), second()
