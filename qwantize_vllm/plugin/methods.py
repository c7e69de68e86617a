"""Which layers QwantizeConfig quantizes, and by which method."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from qwantize_vllm.layer_names import fused_members, matches, named_parts
from qwantize_vllm.plugin.addresses import keep_latent_projections
from qwantize_vllm.plugin.linear import QwantizeLinearMethod
from qwantize_vllm.plugin.measured_experts import MeasuredExperts, measures_experts
from qwantize_vllm.plugin.moe import QwantizeMoEMethod, expert_members, why_not_experts
from qwantize_vllm.plugin.towers import is_of_tower

if TYPE_CHECKING:
    from qwantize_vllm.plugin.config import QwantizeConfig

# What models call the linear layers that decide which experts a token is routed to, or how much a shared one counts.
_GATE = re.compile(r"gate|(\w+_)?router|(\w+_)?experts?_gate")
# What vLLM calls a layer that gives the scores of classes. It gives it its bias by itself, from the file, in the place
# and precision of the weight as it is then: of one that is on the meta device nothing would be left.
_HEADS = ("score", "classifier")

logger = init_logger(f"vllm.{__name__}")


def choose_method(config: QwantizeConfig, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
    """What `get_quant_method` answers for the layer of a name; the report is told of those that are left.

    Raises:
        ValueError: the settings are strict, and the layer cannot be quantized or is named in parts only.
    """
    if isinstance(layer, RoutedExperts):
        return _experts_method(config, layer, prefix)
    settings, members = config.settings, fused_members(prefix, config.packed_modules_mapping)
    named = named_parts(prefix, settings.ignore, config.packed_modules_mapping)
    if not isinstance(layer, LinearBase):
        keep_latent_projections(layer)
        kind = "embedding or head" if isinstance(layer, VocabParallelEmbedding) else type(layer).__name__
        config.report.leave(prefix, layer, kind, named)
        return None
    if named:
        _leave_ignored(config, layer, prefix, named, members)
        return UnquantizedLinearMethod()
    if reason := _why_left(config, layer, prefix):
        config.report.leave(prefix, layer, reason)
        return UnquantizedLinearMethod()
    return QwantizeLinearMethod(settings, prefix, config.report, members)


def _why_left(config: QwantizeConfig, layer: LinearBase, prefix: str) -> str | None:
    """Why a linear layer stays as it is though nobody named it; None where it is quantized."""
    if is_gate(layer, prefix) and not config.settings.quantize_gates:
        return "gate"
    if isinstance(layer, ReplicatedLinear) and prefix.rpartition(".")[2] in _HEADS:
        return "embedding or head"
    if layer.params_dtype == torch.float32 != torch.get_default_dtype():  # the latter is the model's, while it is built
        return "float32 in a model that is not"
    return "of vision or audio" if config.settings.towers == "leave" and is_of_tower(prefix) else None


def _experts_method(config: QwantizeConfig, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
    """The method of all experts of a layer; None leaves them to vLLM."""
    settings = config.settings
    method = QwantizeMoEMethod(settings, prefix, config.report, layer.moe_config)
    reason = why_not_experts(layer.moe_config, settings)
    members = expert_members(layer, prefix)
    named = named_parts(prefix, settings.ignore, {})
    if named := named or [member for member in members if matches(member, settings.ignore)]:
        _leave_ignored(config, layer, prefix, named, members)
        return MeasuredExperts(layer.moe_config) if measures_experts() and not reason else None
    if reason:
        if settings.strict:
            raise ValueError(f"qwantize: {prefix} cannot be quantized: {reason} (strict: true)")
        logger.warning("qwantize: %s is left unquantized: %s", prefix, reason)
        config.report.leave(prefix, layer, reason)
        return None
    return MeasuredExperts(layer.moe_config, method) if measures_experts() else method


def _leave_ignored(
    config: QwantizeConfig, layer: torch.nn.Module, prefix: str, named: list[str], members: list[str]
) -> None:
    if named != [prefix] and len(named) < len(members):
        message = (
            f"qwantize: ignore names {_some(named)} but not every member of {prefix} "
            f"({_some(members)}), which share one weight"
        )
        if config.settings.strict:
            raise ValueError(f"{message}; name all of them, or {prefix!r} (strict: true)")
        logger.warning("%s; the whole layer is left unquantized", message)
    config.report.leave(prefix, layer, "ignored", named)


def is_gate(layer: LinearBase, prefix: str) -> bool:
    """Whether a layer decides which experts a token is routed to."""
    return isinstance(layer, ReplicatedLinear) and _GATE.fullmatch(prefix.rpartition(".")[2]) is not None


def _some(names: list[str]) -> str:
    """The names, or the first of them where they are many."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])} and {len(names) - 3} more"
