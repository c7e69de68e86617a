"""QwantizeLinearMethod: a linear layer that is quantized as soon as its weights have arrived."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from vllm import envs
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import replace_parameter

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.matmul.op import matmul_op, matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.search.quality import signal_and_noise
from qwantize_vllm.search.quantize import describe_nonfinite, matrix_amax, resolve_global_scale, search_nvfp4
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")
# Of activations that the kernels for swizzled weights take.
_SWIZZLED_DTYPES = (torch.bfloat16, torch.float16)
_DONE = "_already_called_process_weights_after_loading"  # vLLM's reload clears it


class QwantizeLinearMethod(LinearMethodBase):
    """Holds `weight` uint8 (N, K/2), `weight_scale` float8_e4m3fn (N, K/block_size) and
    `weight_global_scale` float32 () in place of the dense weight; with `global_scale: amax_per_member`
    the latter is (members,) where layers are fused, and each member is multiplied on its own.

    On a GPU, for bfloat16 or float16 activations and `backend: auto`, `weight` and `weight_scale` are instead the words
    and scales of a SwizzledNvfp4, `weight_global_scale` is float32 () or (N,), and `weight_arrived` is its scratch.

    The dense weight is created on the meta device. vLLM materializes it once all of it has been read,
    calls `process_weights_after_loading`, and goes on to the next layer: at any time at most one dense
    layer exists. A reload of weights comes the same way.
    """

    uses_meta_device = True

    def __init__(self, settings: QwantizeSettings, name: str, report: LoadReport, members: list[str]) -> None:
        self.settings, self.name, self.report, self.members = settings, name, report, members
        self.search = settings.scale_search
        self._hessian_name: str | None = None

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
                file does not fit the layer.
        """
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
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Replace the dense weight by codes and scales.

        Raises:
            ValueError: the weight holds NaN or infinities; names the layer and counts them.
        """
        if getattr(layer, _DONE, False):
            return
        began = time.perf_counter()
        weight = layer.weight.data
        parts = self._quantize(layer, weight)
        energies = [signal_and_noise(*pair) for pair in zip(weight.split(self._widths(layer)), parts, strict=True)]
        signal, noise = (float(sum(energy)) for energy in zip(*energies, strict=True))
        self._keep(layer, parts, weight.dtype)
        after = sum(getattr(layer, name).nbytes for name in ("weight", "weight_scale", "weight_global_scale"))
        setattr(layer, _DONE, True)
        self.report.quantized(self.name, weight.nbytes, after, signal, noise, began)

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        settings = self.settings
        if hasattr(layer, "weight_arrived"):
            return matmul_swizzled_op(
                x,
                layer.weight,
                layer.weight_scale,
                layer.weight_global_scale,
                layer.weight_arrived,
                bias,
                layer.output_size_per_partition,
                settings.block_size,
                "batch_invariant" if envs.VLLM_BATCH_INVARIANT else "auto",
            )
        if layer.weight_global_scale.dim() == 0:
            weight = (layer.weight, layer.weight_scale, layer.weight_global_scale)
            return matmul_op(x, *weight, bias, settings.block_size, settings.backend)
        widths = self._widths(layer)
        weights = zip(
            layer.weight.split(widths), layer.weight_scale.split(widths), layer.weight_global_scale, strict=True
        )
        biases = [None] * len(widths) if bias is None else bias.split(widths)
        outputs = [
            matmul_op(x, *weight, part, settings.block_size, settings.backend)
            for weight, part in zip(weights, biases, strict=True)
        ]
        return torch.cat(outputs, dim=-1)

    def _keep(self, layer: LinearBase, parts: list[Nvfp4Tensor], dtype: torch.dtype) -> None:
        """Put what is multiplied in place of the dense weight, of that dtype."""
        codes = _concatenated([q.codes for q in parts])
        block_scales = _concatenated([q.block_scales for q in parts])
        scales = torch.stack([q.global_scale for q in parts])
        if not codes.is_cuda or dtype not in _SWIZZLED_DTYPES or self.settings.backend != "auto":
            tensors = codes, block_scales, scales if len(parts) > 1 else scales[0]
        else:
            weight = swizzle(Nvfp4Tensor(codes, block_scales, scales[0], self.settings.block_size))
            widths = torch.tensor(self._widths(layer), device=codes.device)
            tensors = weight.words, weight.scales, scales.repeat_interleave(widths) if len(parts) > 1 else scales[0]
            if hasattr(layer, "weight_arrived"):
                layer.weight_arrived.zero_()  # a reload: CUDA graphs know its address
            else:
                layer.weight_arrived = weight.arrived
        for name, tensor in zip(("weight", "weight_scale", "weight_global_scale"), tensors, strict=True):
            replace_parameter(layer, name, tensor)

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
        amax = _amax_over_ranks(layer, torch.stack([matrix_amax(part) for part in parts]))
        if not bool(torch.isfinite(amax).all()):
            raise ValueError(f"qwantize: {self.name}: {describe_nonfinite(weight)} (on this rank)")
        scales = resolve_global_scale(amax, "none" if self.settings.global_scale == "none" else "amax")
        hessian = self._hessian(layer, weight)
        return [
            search_nvfp4(part, self.search, self.settings.block_size, scale, hessian)
            for part, scale in zip(parts, scales, strict=True)
        ]

    def _find_hessian(self, blocks: int) -> None:
        """The name that the file has this layer under; if it has none, and may, the layer is searched without."""
        file, names = self._hessian_file(), list(dict.fromkeys([self.name, *self.members]))
        if file.has(names) or self.settings.strict:
            self._hessian_name = file.find(names, blocks)
        else:
            self.search = "optimal"
            self.report.without_hessian(self.name)

    def _hessian(self, layer: LinearBase, weight: torch.Tensor) -> torch.Tensor | None:
        """This rank's block Hessians, of the layer or of a member that it is fused from."""
        if self._hessian_name is None:
            return None
        blocks = weight.shape[1] // self.settings.block_size
        row_parallel = layer.input_size != layer.input_size_per_partition
        start = layer.tp_rank * blocks if row_parallel else 0
        return self._hessian_file().read(self._hessian_name, start, start + blocks).to(weight.device)

    def _hessian_file(self) -> HessianFile:
        return _open_hessians(str(self.settings.hessian), self.settings.block_size)


def _amax_over_ranks(layer: LinearBase, amax: torch.Tensor) -> torch.Tensor:
    """The largest amax of all shards of a layer, so that the global scale does not depend on tensor parallelism.

    NaN becomes infinity first: every rank then sees it and raises, and none is left waiting.
    """
    if layer.tp_size == 1:
        return amax
    amax = torch.where(amax.isnan(), torch.inf, amax)
    torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    return amax


def _concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    # PyTorch does not concatenate float8 everywhere; its bytes it does.
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


@functools.lru_cache(maxsize=1)
def _open_hessians(path: str, block_size: int) -> HessianFile:
    return HessianFile(path, block_size)
