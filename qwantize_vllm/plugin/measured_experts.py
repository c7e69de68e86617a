"""Experts that tell what they multiply, for calibration: dense, one after the other, in plain PyTorch.

vLLM's kernels for experts take all of them at once and keep what is between their two products to themselves; here it
can be seen. Behind quantized layers the weights are those that their codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

from qwantize_vllm.hessian import BlockHessianSum
from qwantize_vllm.matmul.experts import local_ids
from qwantize_vllm.matmul.experts_cpu import Observe, experts_one_by_one
from qwantize_vllm.plugin.moe import (
    WEIGHTS,
    QwantizeMoEMethod,
    add_dense_weights,
    local_experts,
    weighted_input,
)
from qwantize_vllm.plugin.versions import PROCESSED

# Key of vLLM's additional config that asks for it.
MEASURE = "qwantize_measure"


def measures_experts() -> bool:
    """Whether the engine that is being built is there to be calibrated."""
    additional = get_current_vllm_config().additional_config
    return isinstance(additional, dict) and bool(additional.get(MEASURE))


class MeasuredExperts(FusedMoEMethodBase):
    """Dense experts, quantized as `quantizer` says and dequantized again, or as they are.

    Attributes:
        observe: is told of every product; None: nobody is.
    """

    uses_meta_device = True

    def __init__(self, moe: FusedMoEConfig, quantizer: QwantizeMoEMethod | None = None) -> None:
        super().__init__(moe)
        self.quantizer = quantizer
        self.observe: Observe | None = None

    def create_weights(self, layer: RoutedExperts, *sizes: Any, **given: Any) -> None:
        if self.quantizer is None:
            add_dense_weights(layer, *sizes, **given)
            initialize_online_processing(layer)
        else:
            self.quantizer.create_weights(layer, *sizes, **given)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if self.quantizer is None or getattr(layer, PROCESSED, False):
            return
        for name in WEIGHTS:
            weight = getattr(layer, f"{name}_weight").data
            q = self.quantizer.quantize(name, weight, local_experts(layer))
            weight.copy_(q.dequantize(weight.dtype).flatten(1, 2))
        setattr(layer, PROCESSED, True)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x, topk_weights = weighted_input(layer, x, topk_weights)
        ids, activation = local_ids(topk_ids, layer.expert_map), layer.activation.value
        multiply = torch.nn.functional.linear
        w13, w2 = layer.w13_weight, layer.w2_weight
        return experts_one_by_one(x, [w13], w2, topk_weights, ids, activation, multiply, self.observe)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: what vLLM's own kernels would have to know."""

    def maybe_make_prepare_finalize(self, *args: Any, **kwargs: Any) -> None:
        """None: see QwantizeMoEMethod."""


class ExpertSums:
    """The block Hessians of every expert that a rank has: H = sum of x x' over what is routed to it.

    x is scaled by the weight that the token's result gets: an error of an expert counts in the output as much as that.

    Attributes:
        tokens: how many were routed here, each as often as its part of the experts that it was routed to.
    """

    def __init__(self, layer: RoutedExperts, block_size: int) -> None:
        device = layer.w2_weight.device
        sizes = {name: getattr(layer, f"{name}_weight").shape for name in WEIGHTS}
        self._experts, self._top_k = local_experts(layer), layer.top_k
        self._rank = layer.moe_config.tp_rank
        self._sums = {
            name: [BlockHessianSum(size[2], block_size, device) for _ in range(size[0])] for name, size in sizes.items()
        }
        layer.quant_method.observe = self._add

    def _add(self, expert: int, x: torch.Tensor, h: torch.Tensor, weights: torch.Tensor) -> None:
        if self._rank == 0:  # every rank gets the same x
            self._sums["w13"][expert].add(x.float() * weights[:, None])
        self._sums["w2"][expert].add(h.float() * weights[:, None])

    @property
    def tokens(self) -> float:
        return sum(each.tokens for each in self._sums["w13"]) / self._top_k

    def totals(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name, the rank whose part of K it is, sum), w13 from the first rank alone."""
        for name in WEIGHTS if self._rank == 0 else ("w2",):
            for expert, each in zip(self._experts, self._sums[name], strict=True):
                yield f"{expert}.{name}", self._rank, each.total
