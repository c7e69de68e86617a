"""Linear layers whose codes and scales the checkpoint has: they go into the forms of weights.py as they are."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter

from qwantize_vllm.plugin.loaders import wrap_loaders
from qwantize_vllm.plugin.packed_format import Packed
from qwantize_vllm.plugin.packed_tensors import (
    check_dtype,
    check_scales,
    input_scales,
    members_kept,
    without_zero_scales,
)
from qwantize_vllm.plugin.reloading import check_bias_arrived, old_weights_on_error
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.plugin.versions import PROCESSED
from qwantize_vllm.plugin.weights import Form, QuantizedLayer, choose_form
from qwantize_vllm.settings import QwantizeSettings


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):
    """Creates the tensors that the checkpoint has, and puts what was loaded into one of the forms of weights.py.

    As in QwantizeLinearMethod they are on the meta device until all have arrived, and a reload comes the same way.
    """

    uses_meta_device = True

    def __init__(self, settings: QwantizeSettings, name: str, report: LoadReport, packed: Packed) -> None:
        self.settings, self.name, self.report, self.packed = settings, name, report, packed
        self._form: Form | None = None
        self._members = 0  # global scales that are kept; 0 before there are any
        # How often each tensor was loaded: whole, and for a member of a fused layer.
        self._arrived: Counter[tuple[str, Any]] = Counter()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Raises ValueError where K is no multiple of the block size."""
        rows, k, block_size = sum(output_partition_sizes), input_size_per_partition, self.packed.block_size
        if k % block_size:
            raise ValueError(
                f"qwantize: {self.name}: K={k} (of this rank) is not a multiple of block_size {block_size}"
            )
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition, layer.output_size_per_partition = k, rows
        self._params_dtype = params_dtype
        layout, loader = self.packed.layout, extra_weight_attrs["weight_loader"]
        matrices = {
            layout.codes: (ModelWeightParameter, k // 2, torch.uint8),
            layout.block_scales: (GroupQuantScaleParameter, k // block_size, torch.float8_e4m3fn),
        }
        for name, (kind, columns, dtype) in matrices.items():
            data = torch.empty(rows, columns, dtype=dtype, device="meta")
            param = kind(data=data, input_dim=1, output_dim=0, weight_loader=self._noting(name, loader))
            layer.register_parameter(name, param)
        scalars = [layout.global_scale, *input_scales(self.packed)]
        for name in scalars:
            data = torch.empty(len(output_partition_sizes), dtype=torch.float32, device="meta")
            layer.register_parameter(name, PerTensorScaleParameter(data=data, weight_loader=self._noting(name, loader)))
        self.report.expect(self.name)
        wrap_loaders(layer, self.report)

    @old_weights_on_error()
    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Raises ValueError where a tensor is missing or no scale of NVFP4; names the layer and the tensor."""
        if getattr(layer, PROCESSED, False):
            return
        began = time.perf_counter()
        layout = self.packed.layout
        arrived, self._arrived = self._arrived, Counter()  # of an update that is refused nothing counts for the next
        self._check_arrived(arrived, len(layer.logical_widths))
        check_bias_arrived(layer, self.name, len(layer.logical_widths))
        codes, block_scales, scales = (getattr(layer, name).data for name in layout.names)
        if arrived[layout.global_scale, None] and len(layer.logical_widths) > 1:
            scales = scales[:1]  # fused in the checkpoint too: vLLM loads its only scale as the first
        factors = layout.factor(scales)
        check_scales(self.name, layout, block_scales, factors)
        codes, block_scales = without_zero_scales(codes, block_scales)
        for name in {*layout.names, *input_scales(self.packed)} - {"weight", "weight_scale", "weight_global_scale"}:
            delattr(layer, name)
        quantized = QuantizedLayer(
            codes, block_scales, *_members(factors, layer.logical_widths), self.packed.block_size, self._params_dtype
        )
        if self.settings.backend in ("vllm", "marlin", "humming") and len(quantized.widths) > 1:
            raise ValueError(
                f"qwantize: {self.name}: backend {self.settings.backend!r} takes one global scale a layer, the members "
                "of this one have different ones in the checkpoint; choose backend: auto"
            )
        self._members = members_kept(self.name, "its members", len(quantized.widths), self._members)
        self._form = self._form or choose_form(self.settings, quantized, self.name)
        after = self._form.keep(layer, quantized)
        setattr(layer, PROCESSED, True)
        self.report.quantized(self.name, 0, after, 0.0, 0.0, began)

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._form is None:
            raise RuntimeError(f"qwantize: {self.name} is called before its weights were loaded")
        return self._form.apply(layer, x, bias)

    def _noting(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            member = args[0] if args else next(iter(kwargs.values()), None)
            with old_weights_on_error():
                check_dtype(self.name, name, self.packed.layout, param, loaded_weight)
            result = loader(param, loaded_weight, *args, **kwargs)
            if param.device.type != "meta":  # where vLLM only counts what would be loaded
                self._arrived[name, member] += 1
            return result

        return load

    def _check_arrived(self, arrived: Counter[tuple[str, Any]], members: int) -> None:
        for name in self.packed.layout.names:
            parts = {member for (each, member), count in arrived.items() if each == name and count}
            if None not in parts and len(parts) < members:
                raise ValueError(
                    f"qwantize: {self.name}: the checkpoint lacks {name} of {members - len(parts)} of {members} members"
                )


def _members(factors: torch.Tensor, widths: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Global scales, and the rows that share each: one for all where they are the same."""
    if len(factors) == 1 or bool((factors == factors[0]).all()):
        return factors[:1], [sum(widths)]
    return factors, list(widths)
