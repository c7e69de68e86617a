"""What a layer of experts keeps in place of their dense weights, and how it is multiplied: one class per form.

As in weights.py: `keep` puts the tensors on the layer, in place of those that are there, `apply` multiplies, and a
reload copies what `keep` leaves into the old parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.utils import replace_parameter

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.every_kernel import ExpertKernels
from qwantize_vllm.matmul.experts import local_ids, swizzle_experts
from qwantize_vllm.matmul.op import experts_op, experts_swizzled_op
from qwantize_vllm.plugin.invariance import plain_backend, swizzled_backend
from qwantize_vllm.plugin.kernels_ahead import prepare_kernels
from qwantize_vllm.plugin.vllm_experts import MarlinExperts, why_not_marlin
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")
_PARTS = ("weight", "weight_scale", "weight_global_scale")
# Of activations that the grouped kernel takes.
_GROUPED_DTYPES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class QuantizedExperts:
    """The quantized weights of this rank's experts, on their way to a form.

    Attributes:
        w13: (E, members, 2I/members, K), w2: (E, 1, K, I): as QwantizeMoEMethod.quantize makes them.
        dtype: of the dense weights, and of activations.
    """

    w13: Nvfp4Tensor
    w2: Nvfp4Tensor
    dtype: torch.dtype

    def tensors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """By vLLM's name: codes (E, N, K/2), block scales (E, N, K/block_size), global scales (E, members)."""
        weights = {"w13": self.w13, "w2": self.w2}
        return {
            name: (q.codes.flatten(1, 2), q.block_scales.flatten(1, 2), q.global_scale) for name, q in weights.items()
        }


class ExpertForm(Protocol):
    """A way to hold quantized experts and to multiply by them."""

    def keep(self, layer: RoutedExperts, experts: QuantizedExperts) -> int:
        """Put them on the layer; returns their bytes."""

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """x (M, K) -> (M, K); topk_ids: of all experts of the model, of which some may be on other ranks."""


def choose_expert_form(settings: QwantizeSettings, experts: QuantizedExperts, name: str) -> ExpertForm:
    """The form that the setting `backend` asks for; for auto, the one that is multiplied fastest.

    Raises:
        ValueError: it cannot run here.
    """
    backend, on_gpu = settings.backend, experts.w2.codes.is_cuda
    if backend in ("vllm", "marlin"):
        if reason := why_not_marlin(experts.dtype):
            raise ValueError(f"qwantize: {name}: backend {backend!r} for experts {reason}")
        return MarlinForm()
    if backend == "humming":
        logger.warning("qwantize: %s: backend humming is for linear layers only; experts are served by auto", name)
        backend = "auto"
    if backend in ("auto", "fused") and on_gpu and experts.dtype in _GROUPED_DTYPES:
        return GroupedForm(experts)
    return PlainExpertForm(experts, plain_backend(backend, on_gpu))


class PlainExpertForm:
    """`w13_weight`, `w13_weight_scale` and `w13_weight_global_scale` are codes uint8 (E, 2I, K/2), block scales
    float8_e4m3fn (E, 2I, K/block_size) and global scales float32 (E, members); the same of w2."""

    def __init__(self, experts: QuantizedExperts, backend: str) -> None:
        self.block_size, self.backend = experts.w2.block_size, backend

    def keep(self, layer: RoutedExperts, experts: QuantizedExperts) -> int:
        return _replace(layer, experts.tensors())

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        ids, activation = local_ids(topk_ids, layer.expert_map), layer.activation.value
        w13, w2 = _parts(layer, "w13"), _parts(layer, "w2")
        return experts_op(x, w13, w2, topk_weights, ids, activation, self.block_size, self.backend)


class GroupedForm:
    """The same names, holding words, scales and global scales of SwizzledExperts, the first two as int32: where vLLM
    balances the load of experts (EPLB) NCCL sends them from rank to rank, and it does not send int16."""

    def __init__(self, experts: QuantizedExperts) -> None:
        _, _, self.out, self.intermediate = experts.w2.shape
        self.block_size = experts.w2.block_size

    def keep(self, layer: RoutedExperts, experts: QuantizedExperts) -> int:
        swizzled = {
            name: swizzle_experts(*tensors, self.block_size, gated=name == "w13", total=layer.global_num_experts)
            for name, tensors in experts.tensors().items()
        }
        self._scale_dtype = swizzled["w2"].scales.dtype
        top_k, activation = layer.moe_config.experts_per_token, layer.activation.value
        prepare_kernels(ExpertKernels(swizzled["w13"], swizzled["w2"], top_k, experts.dtype, activation))
        return _replace(
            layer,
            {
                name: (each.words.view(torch.int32), each.scales.view(torch.int32), each.global_scales)
                for name, each in swizzled.items()
            },
        )

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        ids, activation = local_ids(topk_ids, layer.expert_map), layer.activation.value
        w13, w2 = self.parts(layer, "w13"), self.parts(layer, "w2")
        x = x if x.stride(-1) == 1 else x.contiguous()
        rest = (self.intermediate, self.out, self.block_size, layer.global_num_experts, swizzled_backend())
        return experts_swizzled_op(x, w13, w2, topk_weights, ids, activation, *rest)

    def parts(self, layer: RoutedExperts, name: str) -> list[torch.Tensor]:
        """Words, scales and global scales of w13 or w2, as SwizzledExperts has them."""
        words, scales, global_scales = _parts(layer, name)
        return [words.view(torch.int16), scales.view(self._scale_dtype), global_scales]


class MarlinForm:
    """What vLLM's Marlin kernel for experts makes of the tensors of PlainExpertForm."""

    def __init__(self) -> None:
        self.kernel = MarlinExperts()

    def keep(self, layer: RoutedExperts, experts: QuantizedExperts) -> int:
        tensors = experts.tensors()
        return _replace(layer, self.kernel.prepare(layer, tensors["w13"], tensors["w2"], experts.dtype))

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.kernel.apply(layer, x, _parts(layer, "w13"), _parts(layer, "w2"), topk_weights, topk_ids)


def _replace(layer: RoutedExperts, weights: dict[str, Any]) -> int:
    for name, tensors in weights.items():
        for part, tensor in zip(_PARTS, tensors, strict=True):
            replace_parameter(layer, f"{name}_{part}", tensor)
    return sum(tensor.nbytes for tensors in weights.values() for tensor in tensors)


def _parts(layer: RoutedExperts, name: str) -> list[torch.Tensor]:
    return [getattr(layer, f"{name}_{part}") for part in _PARTS]
