"""vLLM's own kernels for experts: Marlin, fed with the codes and scales of this package, and the dense one to compare.

Marlin is also what `backend: vllm` means for experts, on every GPU. Of the NVFP4 backends that vLLM chooses among by
itself (`fused_moe/oracle/nvfp4.py`) those for Blackwell's FP4 tensor cores round activations to FP4 too, mostly by
global scales that only a calibrated checkpoint has; weights alone are taken by Marlin and Humming. B12x, which can do
that on compute capability 12.x from 0.32 on, is left to those who name it by `--moe-backend`.

Written from the sources of vLLM 0.25.1, 0.32.0 and 0.33.0, and not run on Blackwell. Nothing of its kernels is imported
before a function is called.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from qwantize_vllm.format import Nvfp4Tensor

_LAYERS = "vllm.model_executor.layers"
# What is called of vLLM: its module, and the arguments that it is given, which have these names in all three versions.
_CALLED = {
    "is_fp4_marlin_supported": (f"{_LAYERS}.quantization.utils.marlin_utils_fp4", ""),
    "prepare_nvfp4_moe_layer_for_marlin": (
        f"{_LAYERS}.quantization.utils.marlin_utils_fp4",
        "layer w13 w13_scale w13_scale_2 w2 w2_scale w2_scale_2 is_act_and_mul",
    ),
    "marlin_make_workspace_new": (f"{_LAYERS}.quantization.utils.marlin_utils", "device max_blocks_per_sm"),
    "fused_marlin_moe": (
        f"{_LAYERS}.fused_moe.experts.marlin_moe",
        "hidden_states w1 w2 bias1 bias2 w1_scale w2_scale topk_weights topk_ids quant_type_id global_num_experts "
        "activation expert_map global_scale1 global_scale2 workspace",
    ),
}
_BLOCKS_PER_SM = 4  # of which the kernel starts no more: each has a lock in the workspace
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def why_not_marlin(dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run here with activations of this dtype, in a line; None where it can. Never raises."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16, got {dtype}"
    name = ""
    try:
        for name, (_, arguments) in _CALLED.items():
            inspect.signature(_function(name)).bind(**dict.fromkeys(arguments.split()))
        supported = _function("is_fp4_marlin_supported")()
    except Exception as error:  # another vLLM may have moved, renamed or broken anything, here that is but a reason
        what = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
        return f"is not as expected in this version of vLLM: {what}"
    return None if supported else "needs a GPU of compute capability 7.5"


def _function(name: str) -> Any:
    return getattr(importlib.import_module(_CALLED[name][0]), name)


class MarlinExperts:
    """A layer's experts in Marlin's layout."""

    def __init__(self) -> None:
        self._workspace: torch.Tensor | None = None

    def prepare(self, layer: Any, w13: Tensors, w2: Tensors, dtype: torch.dtype) -> dict[str, Tensors]:
        """w13, w2: codes, block scales and global scales (E, 1) -> the same in Marlin's layout, by name."""
        layer.params_dtype = dtype
        tensors = [tensor.squeeze(-1) if tensor.shape[-1] == 1 else tensor for tensor in (*w13, *w2)]
        prepared = _function("prepare_nvfp4_moe_layer_for_marlin")(layer, *tensors, is_act_and_mul=True)
        self._clear_workspace(w13[0].device)
        return {"w13": prepared[:3], "w2": prepared[3:]}

    def _clear_workspace(self, device: torch.device) -> None:
        """Have one, all zeros, that stays where it is: vLLM 0.25.1 makes one with every weight, later ones make none,
        but CUDA graphs hold its address over reloads, before which sleep mode may have lost what was in it."""
        if self._workspace is None:
            self._workspace = _function("marlin_make_workspace_new")(device, _BLOCKS_PER_SM)
        else:
            self._workspace.zero_()

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        w13: Sequence[torch.Tensor],
        w2: Sequence[torch.Tensor],
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        from vllm.scalar_type import scalar_types

        y: torch.Tensor = _function("fused_marlin_moe")(
            hidden_states=x.contiguous(),
            w1=w13[0],
            w2=w2[0],
            bias1=None,
            bias2=None,
            w1_scale=w13[1],
            w2_scale=w2[1],
            topk_weights=topk_weights.float(),
            topk_ids=topk_ids,
            quant_type_id=scalar_types.float4_e2m1f.id,
            global_num_experts=layer.global_num_experts,
            activation=layer.activation,
            expert_map=layer.expert_map,
            global_scale1=w13[2],
            global_scale2=w2[2],
            workspace=self._workspace,
        )
        return y


def marlin_experts(w13: Tensors, w2: Tensors, dtype: torch.dtype, expert_map: torch.Tensor | None = None) -> Any:
    """(x, weights, ids of the experts of each token) -> the result, outside of a model.

    expert_map: None where all experts are here, else int32 by ids: the number of each here, -1 for those elsewhere.

    Raises:
        ValueError: the kernel cannot run here.
    """
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    if reason := why_not_marlin(dtype):
        raise ValueError(reason)
    layer: Any = torch.nn.Module()
    experts = MarlinExperts()
    layer.num_experts = w13[0].shape[0]
    layer.global_num_experts = layer.num_experts if expert_map is None else len(expert_map)
    layer.hidden_size, layer.intermediate_size_per_partition = w2[0].shape[1], 2 * w2[0].shape[2]
    layer.activation, layer.expert_map = MoEActivation.SILU, expert_map
    kept = experts.prepare(layer, w13, w2, dtype)
    return lambda x, weights, ids: experts.apply(layer, x, kept["w13"], kept["w2"], weights, ids)


def first_rank_map(experts: int, ranks: int, device: torch.device) -> torch.Tensor | None:
    """vLLM's expert map of the first of so many ranks, as `local_ids` takes it; None for one rank, without vLLM too."""
    if ranks == 1:
        return None
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    _, places, _ = determine_expert_map(ranks, 0, experts)
    return places.to(device)


def dense_experts(w13: Nvfp4Tensor, w2: Nvfp4Tensor, expert_map: torch.Tensor | None = None) -> Any:
    """As `marlin_experts`, with the dequantized weights in bfloat16."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    a, b = w13.dequantize(torch.bfloat16), w2.dequantize(torch.bfloat16)
    elsewhere = {} if expert_map is None else {"expert_map": expert_map, "global_num_experts": len(expert_map)}
    return lambda x, weights, ids: fused_experts(x, a, b, weights, ids, **elsewhere)
