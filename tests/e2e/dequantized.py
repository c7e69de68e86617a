"""Plain vLLM with linear layers that are quantized and dequantized as it loads them: what ours should be equal to.

This says nothing about how an architecture's weights are named and fused in its checkpoint: vLLM has done that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4

_QUANTIZED: dict[str, Nvfp4Tensor] = {}  # in the engine's process


def dequantize_on_load(layers: Collection[str]) -> None:
    """Run before an engine is made: these layers of it get dequantized weights."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    process = UnquantizedLinearMethod.process_weights_after_loading

    def process_dequantized(self: Any, layer: torch.nn.Module) -> None:
        if layer.prefix in layers:
            q = _QUANTIZED[layer.prefix] = quantize_nvfp4(layer.weight.data)
            layer.weight.data.copy_(q.dequantize(layer.weight.dtype))
        process(self, layer)

    UnquantizedLinearMethod.process_weights_after_loading = process_dequantized


def with_quantized(llm: Any, use: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What `use` says, and as `quantized` what the weights were dequantized from."""
    return {**use(llm), "quantized": _QUANTIZED}
