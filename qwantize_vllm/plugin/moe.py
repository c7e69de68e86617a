"""QwantizeMoEMethod: the experts of a layer, quantized as soon as all of their weights have arrived."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_ep_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.utils import set_weight_attrs

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.matmul.experts import ACTIVATIONS
from qwantize_vllm.plugin.cached import cached
from qwantize_vllm.plugin.expert_weights import ExpertForm, QuantizedExperts, choose_expert_form
from qwantize_vllm.plugin.linear import _open_hessians, largest_over_ranks
from qwantize_vllm.plugin.loaders import wrap_loaders
from qwantize_vllm.plugin.refusals import refuse_all2all
from qwantize_vllm.plugin.rehearsal import end_rehearsal
from qwantize_vllm.plugin.reloading import check_arrived, check_not_moved, is_update, old_weights_on_error
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.plugin.versions import PROCESSED
from qwantize_vllm.search.quality import signal_and_noise
from qwantize_vllm.search.quantize import describe_nonfinite, matrix_amax, resolve_global_scale, search_nvfp4
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")
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
    if moe.is_lora_enabled:
        return "with LoRA vLLM puts kernels of its own in the experts' place"
    if uneven := [f"K={size}" for size in dict.fromkeys(sizes) if size % settings.block_size]:
        are = "is not a multiple" if len(uneven) == 1 else "are not multiples"
        return f"{' and '.join(uneven)} {are} of block_size {settings.block_size}"
    return None


def expert_members(layer: RoutedExperts, prefix: str) -> list[str]:
    """Names of the checkpoint's layers that all experts of a layer are made of."""
    names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    experts = layer.moe_config.num_logical_experts
    return [f"{prefix}.{expert}.{name}" for expert in range(experts) for name in names if name]


class ExpertMethod(FusedMoEMethodBase):
    """Serves the experts of a layer from one of the forms of expert_weights.py, wherever their codes come from.

    As in linear.py weights are created on the meta device, and at any time at most one layer of them exists beside
    those that are served.
    """

    uses_meta_device = True
    supports_eplb = True  # all that a form keeps begins with the dimension of the experts

    def __init__(self, settings: QwantizeSettings, name: str, report: LoadReport, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.settings, self.name, self.report = settings, name, report
        self._form: ExpertForm | None = None
        config = get_current_vllm_config_or_none()
        self._runners: dict[str, Any] = config.compilation_config.static_forward_context if config else {}

    def keep(self, layer: RoutedExperts, experts: QuantizedExperts) -> int:
        """Put them on the layer in place of what is there; returns their bytes.

        Raises:
            ValueError: load balancing has moved the experts that are there.
        """
        check_not_moved(
            self._runners.get(layer.layer_name), self.name, layer.global_num_experts, self.moe.num_logical_experts
        )
        self._form = self._form or choose_expert_form(self.settings, experts, self.name)
        return self._form.keep(layer, experts)

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
        x, topk_weights = weighted_input(layer, x, topk_weights)
        return self._form.apply(layer, x, topk_weights, topk_ids)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: what vLLM's own kernels would have to know."""

    def maybe_make_prepare_finalize(self, *args: Any, **kwargs: Any) -> None:
        """None, which vLLM 0.25 asks for: tokens are exchanged among data-parallel ranks before and after `apply`."""


class QwantizeMoEMethod(ExpertMethod):
    """Quantizes all experts of a layer as soon as their dense weights have arrived.

    Every expert has global scales of its own: one for w13, or with `amax_per_member` one for gate and one for up, and
    one for w2.
    """

    def __init__(self, settings: QwantizeSettings, name: str, report: LoadReport, moe: FusedMoEConfig) -> None:
        super().__init__(settings, name, report, moe)
        self.search = settings.scale_search
        # Full Hessians of experts are not measured: where gptq is asked for, there are none.
        self.refine = "none" if settings.refine == "gptq" else settings.refine
        self._unreached: set[int] = set()
        self._cache = settings.cache_dir
        self._from_cache = True  # whether nothing was searched since a layer's weights have arrived

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
        add_dense_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
        )
        if self.settings.hessian is not None:
            # Here, so that a file that does not fit is refused before weights are read.
            self._find_hessians(layer, hidden_size)
        refuse_all2all(self.moe, self.name)
        self.report.expect(self.name)
        wrap_loaders(layer, self.report)

    @old_weights_on_error()
    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Replace the dense weights by codes and scales.

        Raises:
            ValueError: a weight holds NaN or infinities, or a part is missing; names the layer and counts.
        """
        if getattr(layer, PROCESSED, False):
            return
        began = time.perf_counter()
        dense = {name: getattr(layer, f"{name}_weight").data for name in WEIGHTS}
        check_arrived(
            layer, self.name, sum(weight.numel() for weight in dense.values()), "gate, up and down of all experts"
        )
        end_rehearsal()
        before, dtype = sum(weight.nbytes for weight in dense.values()), dense["w2"].dtype
        self._cache = None if is_update(layer) else self.settings.cache_dir
        experts, self._from_cache = local_experts(layer), self._cache is not None
        quantized = {name: self.quantize(name, weight, experts) for name, weight in dense.items()}
        if self._from_cache:
            self.report.from_cache()
        parts = [part for name in WEIGHTS for part in matrices_of(dense[name], quantized[name])]
        energies = [signal_and_noise(*part) for part in parts]
        signal, noise = map(sum, zip(*energies, strict=True))
        after = self.keep(layer, QuantizedExperts(quantized["w13"], quantized["w2"], dtype))
        setattr(layer, PROCESSED, True)
        self.report.quantized(self.name, before, after, signal, noise, began)

    @property
    def why_optimal(self) -> str | None:
        """Why `optimal` searches where `hessian` was asked for, some experts or all; None where it does not."""
        if self._unreached:
            return f"its experts {sorted(self._unreached)}, to which no token was routed"
        same = self.search == self.settings.scale_search
        return None if same else "the Hessian file does not have all of its experts"

    def quantize(self, name: str, weight: torch.Tensor, experts: Sequence[int]) -> Nvfp4Tensor:
        """w13 or w2 of some experts (e, N, K) as (e, members, N/members, K), each member with a global scale.

        experts: their numbers in the model. What becomes of one does not depend on which others are given.

        Raises:
            ValueError: a weight holds NaN or infinities; names the layer and counts them.
        """
        members = 2 if name == "w13" and self.settings.global_scale == "amax_per_member" else 1
        matrices = weight.unflatten(1, (members, -1))
        amax = largest_over_ranks(matrix_amax(matrices), _group(self.moe), f"{self.name}.{name}")
        if not bool(torch.isfinite(amax).all()):
            whose = f"expert {experts[0]}" if len(experts) == 1 else "all experts"
            raise ValueError(f"qwantize: {self.name}: {name} of {whose}: {describe_nonfinite(weight)} (on this rank)")
        scales = resolve_global_scale(amax, "none" if self.settings.global_scale == "none" else "amax")
        step = max(1, _CHUNK_ELEMENTS // weight[0].numel())
        parts = [slice(start, start + step) for start in range(0, len(weight), step)]
        return concatenate([self._quantize_some(name, matrices[part], scales[part], experts[part]) for part in parts])

    def _quantize_some(
        self, name: str, matrices: torch.Tensor, scales: torch.Tensor, experts: Sequence[int]
    ) -> Nvfp4Tensor:
        """Some of the experts (e, members, N/members, K), from cache_dir where they are there."""
        hessians = self._hessians(name, experts, matrices) if self.search == "hessian" else None
        search = functools.partial(self._search, matrices, scales, hessians, experts)
        block_size = self.settings.block_size
        if self._cache is None:
            return search()
        how = [self.search, self.refine, [i for i, expert in enumerate(experts) if expert in self._unreached]]
        given = [scales, hessians]
        (q,), found = cached(self._cache, self.name, how, [matrices], given, block_size, lambda: [search()])
        self._from_cache = self._from_cache and found
        return q

    def _search(
        self, matrices: torch.Tensor, scales: torch.Tensor, hessians: torch.Tensor | None, experts: Sequence[int]
    ) -> Nvfp4Tensor:
        block_size = self.settings.block_size
        if hessians is None:
            return search_nvfp4(matrices, self.search, block_size, scales)
        q = search_nvfp4(matrices, "hessian", block_size, scales, hessians[:, None], refine=self.refine)
        if unreached := [i for i, expert in enumerate(experts) if expert in self._unreached]:
            other = search_nvfp4(matrices[unreached], "optimal", block_size, scales[unreached])
            q.codes[unreached] = other.codes
            q.block_scales.view(torch.uint8)[unreached] = other.block_scales.view(torch.uint8)
        return q

    def _find_hessians(self, layer: RoutedExperts, hidden_size: int) -> None:
        """See that the file has this rank's experts; if it has not, and may, they are searched without.

        Raises:
            ValueError: it does not fit; or it has not all of them, or was measured without reaching all, and strict.
        """
        file, block_size = _hessian_file(self.settings), self.settings.block_size
        experts, strict = local_experts(layer), self.settings.strict
        names = {name: [f"{self.name}.{expert}.{name}" for expert in experts] for name in WEIGHTS}
        if not strict and not all(file.has([each]) for each in itertools.chain(*names.values())):
            self.search = "optimal"
            self.report.without_hessian(self.name)
            return
        sizes = {"w13": hidden_size, "w2": self.moe.intermediate_size}
        for name, each in names.items():
            file.check_blocks(each, sizes[name] // block_size)
        seen = file.read_each(names["w13"], 0, sizes["w13"] // block_size).flatten(1).any(1)
        self._unreached = {expert for expert, reached in zip(experts, seen.tolist(), strict=True) if not reached}
        if self._unreached:
            message = f"qwantize: {self.name}: no token of {file.path} was routed to experts {sorted(self._unreached)}"
            if strict:
                raise ValueError(f"{message}; calibrate on more text (strict: true)")
            logger.warning("%s; they are searched by optimal", message)

    def _hessians(self, name: str, experts: Sequence[int], matrices: torch.Tensor) -> torch.Tensor:
        """Block Hessians of some experts (e, K/block_size, block_size, block_size), those of this rank's K."""
        blocks = matrices.shape[-1] // self.settings.block_size
        start = self.moe.tp_rank * blocks if name == "w2" else 0
        names = [f"{self.name}.{expert}.{name}" for expert in experts]
        return _hessian_file(self.settings).read_each(names, start, start + blocks).to(matrices.device)


def add_dense_weights(
    layer: RoutedExperts,
    num_experts: int,
    hidden_size: int,
    intermediate_size_per_partition: int,
    params_dtype: torch.dtype,
    **extra_weight_attrs: Any,
) -> None:
    """Create w13_weight (E, 2I, K) and w2_weight (E, K, I) on the meta device."""
    layer.num_experts = num_experts
    shapes = {
        "w13": (num_experts, 2 * intermediate_size_per_partition, hidden_size),
        "w2": (num_experts, hidden_size, intermediate_size_per_partition),
    }
    for name, shape in shapes.items():
        weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype, device="meta"), requires_grad=False)
        layer.register_parameter(f"{name}_weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)


def weighted_input(
    layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and the weights of the results; some models, of one expert a token, weight x instead."""
    if not layer.apply_router_weight_on_input:
        return x, topk_weights
    return x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)


def local_experts(layer: RoutedExperts) -> list[int]:
    """The numbers that this rank's experts have in the model, in the order in which it holds them.

    With load balancing some are there twice: vLLM numbers such copies on from the last expert, and makes them of the
    first ones.
    """
    if layer.expert_map is None:
        return list(range(layer.local_num_experts))
    places = layer.expert_map.tolist()
    held = sorted((expert for expert, place in enumerate(places) if place >= 0), key=places.__getitem__)
    return [expert % layer.moe_config.num_logical_experts for expert in held]


def matrices_of(weight: torch.Tensor, q: Nvfp4Tensor) -> list[tuple[torch.Tensor, Nvfp4Tensor]]:
    """The matrices (N/members, K) of all experts, from (E, N, K), each with what became of it."""
    matrices = weight.unflatten(1, (q.shape[1], -1)).flatten(0, 1)
    flat = Nvfp4Tensor(q.codes.flatten(0, 1), q.block_scales.flatten(0, 1), q.global_scale.flatten(), q.block_size)
    return [(matrices[i], flat[i]) for i in range(len(matrices))]


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
