"""Experts whose codes and scales the checkpoint has: they go into the forms of expert_weights.py as they are."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.utils import set_weight_attrs

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.plugin.expert_weights import QuantizedExperts
from qwantize_vllm.plugin.loaders import wrap_loaders
from qwantize_vllm.plugin.moe import ExpertMethod, local_experts
from qwantize_vllm.plugin.packed_format import Packed
from qwantize_vllm.plugin.packed_tensors import (
    check_dtype,
    check_scales,
    input_scales,
    members_kept,
    without_zero_scales,
)
from qwantize_vllm.plugin.refusals import refuse_all2all
from qwantize_vllm.plugin.reloading import old_weights_on_error
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.plugin.versions import PROCESSED
from qwantize_vllm.settings import QwantizeSettings

_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}  # vLLM's names for gate, up and down


class PackedMoEMethod(ExpertMethod):
    """Creates the tensors that the checkpoint has of each expert, stacked, and serves from what was loaded into them.

    Where gate and up of an expert have different global scales, both are kept.
    """

    def __init__(
        self, settings: QwantizeSettings, name: str, report: LoadReport, moe: FusedMoEConfig, packed: Packed
    ) -> None:
        super().__init__(settings, name, report, moe)
        self.packed = packed
        # Which tensor, of which of the model's experts, of gate, up or down.
        self._arrived: set[tuple[str, int, str]] = set()
        self._members = 0  # global scales of gate and up that are served; 0 before the first weights

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create, for w13 and w2, codes uint8 (E, N, K/2), block scales float8_e4m3fn (E, N, K/block_size), and scalars
        float32 (E, members), all on the meta device."""
        layer.num_experts = num_experts
        self._params_dtype = params_dtype
        layout, loader = self.packed.layout, extra_weight_attrs.pop("weight_loader")
        inner = intermediate_size_per_partition
        for weight, n, k in (("w13", 2 * inner, hidden_size), ("w2", hidden_size, inner)):
            matrices = {
                layout.codes: (k // 2, torch.uint8),
                layout.block_scales: (k // self.packed.block_size, torch.float8_e4m3fn),
            }
            for name, (columns, dtype) in matrices.items():
                data = torch.empty(num_experts, n, columns, dtype=dtype, device="meta")
                self._add(layer, weight, name, data, loader, extra_weight_attrs)
            for name in (layout.global_scale, *input_scales(self.packed)):
                data = torch.empty(num_experts, len(_SHARDS[weight]), device="meta", dtype=torch.float32)
                self._add(layer, weight, name, data, functools.partial(_load_scalar, layer), extra_weight_attrs)
        refuse_all2all(self.moe, self.name)
        self.report.expect(self.name)
        wrap_loaders(layer, self.report)

    @old_weights_on_error()
    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Raises ValueError where a tensor is missing or no scale of NVFP4; names the layer and the tensor."""
        if getattr(layer, PROCESSED, False):
            return
        began = time.perf_counter()
        self._check_arrived(layer)
        experts = QuantizedExperts(self._loaded(layer, "w13"), self._loaded(layer, "w2"), self._params_dtype)
        self._check_members(experts.w13.shape[1])
        after = self.keep(layer, experts)
        setattr(layer, PROCESSED, True)
        self.report.quantized(self.name, 0, after, 0.0, 0.0, began)

    def _add(
        self, layer: RoutedExperts, weight: str, name: str, data: torch.Tensor, loader: Any, attributes: dict[str, Any]
    ) -> None:
        param = torch.nn.Parameter(data, requires_grad=False)
        layer.register_parameter(f"{weight}_{name}", param)
        # By which vLLM's loader knows that block scales are sharded as their weight is.
        kind = FusedMoeWeightScaleSupported.GROUP.value
        set_weight_attrs(param, {**attributes, "weight_loader": self._noting(name, loader), "quant_method": kind})

    def _noting(self, name: str, loader: Callable[..., bool]) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(
            param: Any,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            here = loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
            if here:
                with old_weights_on_error():
                    check_dtype(f"{self.name}.{expert_id}", name, self.packed.layout, param, loaded_weight)
                if param.device.type != "meta":  # where vLLM only counts what would be loaded
                    # With load balancing copies of an expert have numbers of their own, as in local_experts.
                    self._arrived.add((name, expert_id % self.moe.num_logical_experts, shard_id))
            return here if return_success else None

        return load

    def _check_arrived(self, layer: RoutedExperts) -> None:
        projections = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        lacking = [
            f"{expert}.{projection}.{name}"
            for expert in local_experts(layer)
            for shard, projection in projections.items()
            for name in self.packed.layout.names
            if (name, expert, shard) not in self._arrived
        ]
        self._arrived.clear()
        if lacking:
            raise ValueError(
                f"qwantize: {self.name}: the checkpoint lacks {len(lacking)} tensors of its experts (on this rank), "
                f"{lacking[0]} among them; each must have {', '.join(self.packed.layout.names)}"
            )

    def _check_members(self, members: int) -> None:
        """Whether gate and up may have `members` global scales."""
        if members > 1 and self.settings.backend in ("vllm", "marlin"):
            raise ValueError(
                f"qwantize: {self.name}: backend {self.settings.backend!r} takes one global scale for gate and up, "
                "those of this layer have different ones in the checkpoint; choose backend: auto"
            )
        self._members = members_kept(self.name, "gate and up", members, self._members)

    def _loaded(self, layer: RoutedExperts, weight: str) -> Nvfp4Tensor:
        """What has arrived of w13 or w2, (E, members, N/members, K); members is 1 where their global scales agree."""
        layout = self.packed.layout
        codes, block_scales, scales = (getattr(layer, f"{weight}_{name}").data for name in layout.names)
        factors = layout.factor(scales)
        check_scales(f"{self.name}: {weight}", layout, block_scales, factors)
        codes, block_scales = without_zero_scales(codes, block_scales)
        if bool((factors == factors[:, :1]).all()):
            factors = factors[:, :1].contiguous()
        for name in {*layout.names, *input_scales(self.packed)} - {"weight", "weight_scale", "weight_global_scale"}:
            delattr(layer, f"{weight}_{name}")
            setattr(layer, f"{weight}_{name}", _Loaded())
        split = (factors.shape[1], -1)
        return Nvfp4Tensor(codes.unflatten(1, split), block_scales.unflatten(1, split), factors, self.packed.block_size)


class _Loaded:
    """In the place of a parameter that has been used up: other ranks' experts are offered to this one still."""

    @staticmethod
    def weight_loader(*args: Any, **kwargs: Any) -> bool:
        """False: nothing was loaded."""
        return False


def _load_scalar(
    layer: RoutedExperts,
    param: Any,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool:
    """Of one expert's gate, up or down; False where the expert is on another rank.

    vLLM's own loader knows scalars by more names than one, and gives all members of an expert the last one's input
    scale.
    """
    place = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if place < 0:
        return False
    param.data[place, int(shard_id == "w3")].copy_(loaded_weight.reshape(()))
    return True
