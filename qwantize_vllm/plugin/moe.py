"""QwantizeMoEMethod: the experts of a layer, quantized as soon as all of their weights have arrived."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from vllm.distributed import get_ep_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.matmul.experts import ACTIVATIONS
from qwantize_vllm.plugin.expert_weights import ExpertForm, QuantizedExperts, choose_expert_form
from qwantize_vllm.plugin.linear import _open_hessians, largest_over_ranks
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.search.quality import signal_and_noise
from qwantize_vllm.search.quantize import describe_nonfinite, matrix_amax, resolve_global_scale, search_nvfp4
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")
_DONE = "_already_called_process_weights_after_loading"  # vLLM's reload clears it
_CHUNK_ELEMENTS = 2**28  # weights searched at once, in whole experts
WEIGHTS = ("w13", "w2")  # vLLM's names: gate above up, and down


def why_not_experts(moe: FusedMoEConfig, settings: QwantizeSettings) -> str | None:
    """Why experts of such a layer stay as they are, the same on every rank; None where they are quantized."""
    limits = [name for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta") if getattr(moe, name, None) is not None]
    sizes = (moe.hidden_dim, moe.intermediate_size_per_partition)
    if moe.has_bias:
        return "experts with biases are not supported yet"
    if moe.activation.value not in ACTIVATIONS or limits:
        return f"experts with activation {moe.activation.value}{' and '.join(['', *limits])} are not supported yet"
    if any(size % settings.block_size for size in sizes):
        return f"K={sizes[0]} and K={sizes[1]} are not multiples of block_size {settings.block_size}"
    if settings.refine == "gptq":
        return "refine: gptq does not take experts yet; refine: codes does"
    return None


def expert_members(layer: RoutedExperts, prefix: str) -> list[str]:
    """Names of the checkpoint's layers that all experts of a layer are made of."""
    names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    return [f"{prefix}.{expert}.{name}" for expert in range(layer.global_num_experts) for name in names if name]


class QwantizeMoEMethod(FusedMoEMethodBase):
    """Replaces the dense weights of all experts by one of the forms of expert_weights.py.

    As in linear.py weights are created on the meta device, and at any time at most one layer of dense experts exists.
    Every expert has global scales of its own: one for w13, or with `amax_per_member` one for gate and one for up, and
    one for w2.
    """

    uses_meta_device = True

    def __init__(self, settings: QwantizeSettings, name: str, report: LoadReport, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.settings, self.name, self.report = settings, name, report
        self._form: ExpertForm | None = None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the dense weights on the meta device.

        Raises:
            ValueError: the Hessian file does not fit the layer.
        """
        layer.num_experts = num_experts
        shapes = {
            "w13": (num_experts, 2 * intermediate_size_per_partition, hidden_size),
            "w2": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=params_dtype, device="meta")
            weight = torch.nn.Parameter(empty, requires_grad=False)
            layer.register_parameter(f"{name}_weight", weight)
            set_weight_attrs(weight, extra_weight_attrs)
        self.report.expect(self.name)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Replace the dense weights by codes and scales.

        Raises:
            ValueError: a weight holds NaN or infinities; names the layer and counts them.
        """
        if getattr(layer, _DONE, False):
            return
        began = time.perf_counter()
        dense = {name: getattr(layer, f"{name}_weight").data for name in WEIGHTS}
        before, dtype = sum(weight.nbytes for weight in dense.values()), dense["w2"].dtype
        quantized = {name: self.quantize(layer, name, weight) for name, weight in dense.items()}
        energies = [energies_of(dense[name], quantized[name]) for name in WEIGHTS]
        signal, noise = (float(sum(each)) for each in zip(*energies, strict=True))
        experts = QuantizedExperts(quantized["w13"], quantized["w2"], dtype)
        self._form = self._form or choose_expert_form(self.settings, experts, self.name)
        after = self._form.keep(layer, experts)
        setattr(layer, _DONE, True)
        self.report.quantized(self.name, before, after, signal, noise, began)

    def quantize(self, layer: RoutedExperts, name: str, weight: torch.Tensor) -> Nvfp4Tensor:
        """A weight (E, N, K) of this rank as (E, members, N/members, K), each member with a global scale."""
        members = 2 if name == "w13" and self.settings.global_scale == "amax_per_member" else 1
        matrices = weight.unflatten(1, (members, -1))
        amax = largest_over_ranks(matrix_amax(matrices), _group(self.moe))
        if not bool(torch.isfinite(amax).all()):
            raise ValueError(
                f"qwantize: {self.name}: {name} of all experts: {describe_nonfinite(weight)} (on this rank)"
            )
        scales = resolve_global_scale(amax, "none" if self.settings.global_scale == "none" else "amax")
        search = functools.partial(search_nvfp4, scale_search=self.settings.scale_search, refine=self.settings.refine)
        step = max(1, _CHUNK_ELEMENTS // weight[0].numel())
        parts = [
            search(matrices[i : i + step], block_size=self.settings.block_size, global_scale=scales[i : i + step])
            for i in range(0, len(weight), step)
        ]
        return concatenate(parts)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (M, K) -> (M, K): the experts of this rank; vLLM has computed the shared ones, and adds up ranks."""
        if self._form is None:
            raise RuntimeError(f"qwantize: {self.name} is called before its weights were loaded")
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return self._form.apply(layer, x, topk_weights, topk_ids)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: what vLLM's own kernels would have to know."""

    def maybe_make_prepare_finalize(self, *args: Any, **kwargs: Any) -> None:
        """None, which vLLM 0.25 asks for: tokens are exchanged among data-parallel ranks before and after `apply`."""


def energies_of(weight: torch.Tensor, q: Nvfp4Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise of all matrices of a weight (E, N, K); see search/quality.py."""
    matrices = weight.unflatten(1, (q.shape[1], -1)).flatten(0, 1)
    flat = Nvfp4Tensor(q.codes.flatten(0, 1), q.block_scales.flatten(0, 1), q.global_scale.flatten(), q.block_size)
    signal, noise = zip(*(signal_and_noise(matrices[i], flat[i]) for i in range(len(matrices))), strict=True)
    return torch.stack(signal).sum(), torch.stack(noise).sum()


def concatenate(parts: list[Nvfp4Tensor]) -> Nvfp4Tensor:
    """Batches one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Nvfp4Tensor(
        torch.cat([q.codes for q in parts]),
        torch.cat([q.block_scales.view(torch.uint8) for q in parts]).view(parts[0].block_scales.dtype),
        torch.cat([q.global_scale for q in parts]),
        parts[0].block_size,
    )


def _group(moe: FusedMoEConfig) -> Any:
    """Who shares the rows and columns of each expert with this rank; None where nobody does."""
    if moe.tp_size == 1:
        return None
    # Without expert parallelism the ranks of data parallelism share experts too.
    group = get_tp_group()
    return group if group.world_size == moe.tp_size else get_ep_group()


def _hessian_file(settings: QwantizeSettings) -> HessianFile:
    return _open_hessians(str(settings.hessian), settings.block_size)
