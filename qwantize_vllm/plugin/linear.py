"""QwantizeLinearMethod: a linear layer that is quantized as soon as its weights have arrived."""

from __future__ import annotations

import dataclasses
import functools
import time
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.parameter import ModelWeightParameter

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.plugin.cached import cached
from qwantize_vllm.plugin.loaders import wrap_loaders
from qwantize_vllm.plugin.rehearsal import begin_rehearsal, end_rehearsal
from qwantize_vllm.plugin.reloading import check_arrived, check_bias_arrived, is_update, old_weights_on_error
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.plugin.versions import DENSE_SHORTCUT, PROCESSED
from qwantize_vllm.plugin.weights import Form, QuantizedLayer, choose_form
from qwantize_vllm.search.gptq import GptqOptions
from qwantize_vllm.search.quality import signal_and_noise
from qwantize_vllm.search.quantize import describe_nonfinite, matrix_amax, resolve_global_scale, search_nvfp4
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")


class QwantizeLinearMethod(LinearMethodBase):
    """Replaces the dense weight by one of the forms of weights.py.

    The dense weight is created on the meta device. vLLM materializes it once all of it has been read,
    calls `process_weights_after_loading`, and goes on to the next layer: at any time at most one dense
    layer exists. A reload of weights comes the same way.
    """

    uses_meta_device = True

    def __init__(self, settings: QwantizeSettings, name: str, report: LoadReport, members: list[str]) -> None:
        self.settings, self.name, self.report, self.members = settings, name, report, members
        self.search, self.refine = settings.scale_search, settings.refine
        self._hessian_name: str | None = None
        self._form: Form | None = None

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
        """Create the dense weight on the meta device, or hand the layer to vLLM where K does not divide.

        Raises:
            ValueError: K is not a multiple of the block size and the settings are strict; the Hessian
                file does not fit the layer; refine is gptq and the layer is on several ranks.
        """
        self._check_ranks(layer)
        block_size = self.settings.block_size
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = sum(output_partition_sizes)
        if input_size_per_partition % block_size:
            self._leave(layer, f"K={input_size_per_partition} is not a multiple of block_size {block_size}")
            layer.quant_method.create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra_weight_attrs,
            )
            return
        weight = ModelWeightParameter(
            data=torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype, device="meta"),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs.get("weight_loader"),
        )
        layer.register_parameter("weight", weight)
        if self.settings.hessian is not None:
            # Here, so that a file that does not fit is refused before weights are read.
            self._find_hessian(input_size // block_size)
        self.report.expect(self.name)
        begin_rehearsal(self.settings, input_size_per_partition, params_dtype, torch.empty(0).device)
        wrap_loaders(layer, self.report)

    @old_weights_on_error()
    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Replace the dense weight by codes and scales.

        Raises:
            ValueError: the weight holds NaN or infinities, or a part of it is missing; names the layer and counts.
        """
        if getattr(layer, PROCESSED, False):
            return
        began = time.perf_counter()
        weight = layer.weight.data
        check_arrived(layer, self.name, weight.numel(), ", ".join(self.members))
        check_bias_arrived(layer, self.name, len(layer.logical_widths))
        end_rehearsal()
        parts = self.quantized_parts(layer, weight)
        signal, noise = map(sum, zip(*(signal_and_noise(*part) for part in parts), strict=True))
        quantized = QuantizedLayer.of([q for _, q in parts], weight.dtype)
        self._form = self._form or choose_form(self.settings, quantized, self.name)
        after = self._form.keep(layer, quantized)
        setattr(layer, PROCESSED, True)
        if getattr(layer, DENSE_SHORTCUT, False):
            setattr(layer, DENSE_SHORTCUT, False)
        self.report.quantized(self.name, weight.nbytes, after, signal, noise, began)

    def quantized_parts(self, layer: LinearBase, weight: torch.Tensor) -> list[tuple[torch.Tensor, Nvfp4Tensor]]:
        """The rows of this rank's dense weight that share a global scale, each with what becomes of it."""
        return list(zip(weight.split(self._widths(layer)), self._quantize(layer, weight), strict=True))

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._form is None:
            raise RuntimeError(f"qwantize: {self.name} is called before its weights were loaded")
        return self._form.apply(layer, x, bias)

    @property
    def why_optimal(self) -> str | None:
        """Why `optimal` searches where `hessian` was asked for; None where it does not."""
        return None if self.search == self.settings.scale_search else "the Hessian file does not have it"

    def _check_ranks(self, layer: LinearBase) -> None:
        if self.refine == "gptq" and layer.tp_size > 1:
            raise ValueError(
                f"qwantize: {self.name} is on {layer.tp_size} ranks; refine: gptq compensates errors across a whole "
                "layer, which must be on one: start with --tensor-parallel-size 1, or set refine: codes"
            )

    def _leave(self, layer: LinearBase, reason: str) -> None:
        if self.settings.strict:
            raise ValueError(f"qwantize: {self.name} cannot be quantized: {reason} (strict: true)")
        logger.warning("qwantize: %s is left unquantized: %s", self.name, reason)
        layer.quant_method = UnquantizedLinearMethod()
        self.report.leave(self.name, layer, reason)

    def _widths(self, layer: LinearBase) -> list[int]:
        """Rows of this rank's weight that share a global scale."""
        if self.settings.global_scale == "amax_per_member":
            return list(layer.logical_widths)
        return [layer.output_size_per_partition]

    def _quantize(self, layer: LinearBase, weight: torch.Tensor) -> list[Nvfp4Tensor]:
        parts = weight.split(self._widths(layer))
        group = get_tp_group() if layer.tp_size > 1 else None
        amax = largest_over_ranks(torch.stack([matrix_amax(part) for part in parts]), group, self.name)
        if not bool(torch.isfinite(amax).all()):
            raise ValueError(f"qwantize: {self.name}: {describe_nonfinite(weight)} (on this rank)")
        scales = resolve_global_scale(amax, "none" if self.settings.global_scale == "none" else "amax")
        hessian = self._hessian(layer, weight)
        if self.settings.cache_dir is None or is_update(layer):
            return self._search(parts, scales, hessian)
        how = [self.search, self.refine, dataclasses.astuple(self._gptq)]
        search = functools.partial(self._search, parts, scales, hessian)
        quantized, found = cached(
            self.settings.cache_dir, self.name, how, parts, [scales, hessian], self.settings.block_size, search
        )
        if found:
            self.report.from_cache()
        return quantized

    def _search(
        self, parts: Sequence[torch.Tensor], scales: torch.Tensor, hessian: torch.Tensor | None
    ) -> list[Nvfp4Tensor]:
        search = functools.partial(search_nvfp4, refine=self.refine, gptq=self._gptq)
        try:
            return [
                search(part, self.search, self.settings.block_size, scale, hessian)
                for part, scale in zip(parts, scales, strict=True)
            ]
        except ValueError as error:  # a Hessian that gptq cannot use
            raise ValueError(f"qwantize: {self.name}: {error}") from error

    def _find_hessian(self, blocks: int) -> None:
        """The name that the file has this layer under; if it has none, and may, the layer is searched without."""
        file, names = self._hessian_file(), list(dict.fromkeys([self.name, *self.members]))
        if file.has(names) or self.settings.strict:
            self._hessian_name = file.find(names, blocks)
        else:
            self.search, self.refine = "optimal", "none"
            self.report.without_hessian(self.name)

    def _hessian(self, layer: LinearBase, weight: torch.Tensor) -> torch.Tensor | None:
        """This rank's block Hessians, of the layer or of a member that it is fused from; for gptq its whole Hessian."""
        if self._hessian_name is None:
            return None
        if self.refine == "gptq":
            return self._hessian_file().read_full(self._hessian_name).to(weight.device)
        blocks = weight.shape[1] // self.settings.block_size
        row_parallel = layer.input_size != layer.input_size_per_partition
        start = layer.tp_rank * blocks if row_parallel else 0
        return self._hessian_file().read(self._hessian_name, start, start + blocks).to(weight.device)

    @property
    def _gptq(self) -> GptqOptions:
        return GptqOptions(self.settings.gptq_damping, self.settings.gptq_order, self.settings.gptq_sweeps)

    def _hessian_file(self) -> HessianFile:
        return _open_hessians(str(self.settings.hessian), self.settings.block_size)


def largest_over_ranks(amax: torch.Tensor, group: Any, name: str) -> torch.Tensor:
    """The largest amax of all shards of the layer of a name: the global scale does not depend on tensor parallelism.

    group: vLLM's, of the ranks that have shards; None where this one has all. NaN becomes infinity first: every rank
    then sees it and raises, and none is left waiting.

    Raises:
        RuntimeError: another rank has come to another layer; on all ranks.
    """
    if group is None:
        return amax
    number = zlib.crc32(name.encode())
    bounds = torch.tensor([number, -number], device=amax.device)
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX, group=group.device_group)
    if bounds.sum() != 0:
        raise RuntimeError(
            f"qwantize: the ranks get their weights in different orders: this one has those of {name}, another one "
            "those of another layer, and they must agree on a layer's global scale; start with a --load-format that "
            "reads files one after the other, such as the default"
        )
    amax = torch.where(amax.isnan(), torch.inf, amax)
    torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group.device_group)
    return amax


@functools.lru_cache(maxsize=1)
def _open_hessians(path: str, block_size: int) -> HessianFile:
    return HessianFile(path, block_size)
