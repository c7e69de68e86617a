"""QwantizeConfig: what `--quantization qwantize` selects, and which layers it quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.layer_names import fused_members, matches, named_parts
from qwantize_vllm.plugin.base_config import METHOD, QwantizeBaseConfig, add_to_compile_key
from qwantize_vllm.plugin.fingerprint import config_fingerprint
from qwantize_vllm.plugin.linear import QwantizeLinearMethod
from qwantize_vllm.plugin.measured_experts import MeasuredExperts, measures_experts
from qwantize_vllm.plugin.moe import QwantizeMoEMethod, expert_members, why_not_experts
from qwantize_vllm.plugin.packed import PackedConfig
from qwantize_vllm.plugin.packed_format import packed_of
from qwantize_vllm.plugin.reloading import refuse_sparse_updates
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.plugin.towers import is_of_tower
from qwantize_vllm.plugin.trust import PATHS, with_trusted_paths
from qwantize_vllm.settings import (
    ENVIRONMENT_VARIABLE,
    QwantizeSettings,
    environment_settings,
    read_settings_file,
    resolve_settings,
)

_CHECKPOINT = "the checkpoint's quantization_config or --hf-overrides"
_ADDITIONAL = "--additional-config"
# What models call the linear layers that decide which experts a token is routed to, or how much a shared one counts.
_GATES = ("gate", "router", "shared_expert_gate")

logger = init_logger(f"vllm.{__name__}")


class QwantizeConfig(QwantizeBaseConfig):
    """Online NVFP4 quantization of every linear layer and of experts.

    vLLM makes one per engine and pickles it to the engine's processes, so until the first layer
    asks for its method it holds nothing but what was given.
    """

    def __init__(self, given: Mapping[str, Any] | None = None, source: str = _CHECKPOINT) -> None:
        """given: settings by key; source: where they come from, for messages.

        Raises:
            ValueError, FileNotFoundError: see `resolve_settings` and `environment_settings`.
        """
        super().__init__()
        if source == _CHECKPOINT and given and "cache_dir" in given:
            raise ValueError(
                "qwantize settings: cache_dir is not taken from a checkpoint or --hf-overrides; whoever has files "
                "written must be you: give it by --additional-config or QWANTIZE_CONFIG"
            )
        self._source, self._given = source, dict(given or {})
        self._resolved: QwantizeSettings | None = None
        self._report: LoadReport | None = None
        # Additional config is not known yet, nor who named a file; all else is refused here, before an engine starts.
        look_for_files = source != _CHECKPOINT or not any(key in self._given for key in PATHS)
        resolve_settings({source: self._given, **_environment()}, look_for_files)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, **kwargs: Any) -> Any:
        """With --quantization qwantize, a checkpoint that is NVFP4 already is ours; others are refused by name."""
        if user_quant != METHOD or not hf_quant_cfg or hf_quant_cfg.get("quant_method") == METHOD:
            return None
        packed_of(hf_quant_cfg)
        return METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QwantizeBaseConfig:
        if config.get("quant_method") != METHOD or config.get("packed"):
            return PackedConfig(config)
        return cls({key: value for key, value in config.items() if key != "quant_method"})

    @classmethod
    def from_config_file(cls, config_file: str) -> QwantizeConfig:
        return cls(read_settings_file(config_file), source=config_file)

    @property
    def settings(self) -> QwantizeSettings:
        """The settings of all sources; the first access must be while vLLM builds the model."""
        if self._resolved is None:
            config = get_current_vllm_config()
            refuse_sparse_updates(config)
            additional = config.additional_config
            extra = additional.get(METHOD, {}) if isinstance(additional, dict) else {}
            own = with_trusted_paths(self._given, config) if self._source == _CHECKPOINT else self._given
            self._resolved, origin = resolve_settings({self._source: own, _ADDITIONAL: extra, **_environment()})
            given = ", ".join(f"{key} (from {source})" for key, source in origin.items()) or "all defaults"
            if self._resolved.hessian is not None:
                file = HessianFile(self._resolved.hessian, self._resolved.block_size)
                file.check_model(config_fingerprint(config.model_config.hf_config))
                if self._resolved.refine == "gptq":
                    file.check_full()
            logger.info("qwantize settings: %s; given: %s", self._resolved, given)
            add_to_compile_key(additional, self._resolved)
        return self._resolved

    @property
    def report(self) -> LoadReport:
        """What is quantized and what is left, logged once the last layer is done."""
        if self._report is None:
            self._report = LoadReport(self.settings)
        return self._report

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        named = named_parts(prefix, self.settings.ignore, self.packed_modules_mapping)
        if not isinstance(layer, LinearBase):
            kind = "embedding or head" if isinstance(layer, VocabParallelEmbedding) else type(layer).__name__
            self.report.leave(prefix, layer, kind, named)
            return None
        if named:
            self._leave_ignored(layer, prefix, named, self._members(prefix))
            return UnquantizedLinearMethod()
        if reason := self._why_left(layer, prefix):
            self.report.leave(prefix, layer, reason)
            return UnquantizedLinearMethod()
        return QwantizeLinearMethod(self.settings, prefix, self.report, self._members(prefix))

    def _why_left(self, layer: LinearBase, prefix: str) -> str | None:
        """Why a linear layer stays as it is though nobody named it; None where it is quantized."""
        if is_gate(layer, prefix) and not self.settings.quantize_gates:
            return "gate"
        return "of vision or audio" if self.settings.towers == "leave" and is_of_tower(prefix) else None

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """The method of all experts of a layer; None leaves them to vLLM."""
        method = QwantizeMoEMethod(self.settings, prefix, self.report, layer.moe_config)
        reason = why_not_experts(layer.moe_config, self.settings)
        members = expert_members(layer, prefix)
        named = named_parts(prefix, self.settings.ignore, {})
        if named := named or [member for member in members if matches(member, self.settings.ignore)]:
            self._leave_ignored(layer, prefix, named, members)
            return MeasuredExperts(layer.moe_config) if measures_experts() and not reason else None
        if reason:
            if self.settings.strict:
                raise ValueError(f"qwantize: {prefix} cannot be quantized: {reason} (strict: true)")
            logger.warning("qwantize: %s is left unquantized: %s", prefix, reason)
            self.report.leave(prefix, layer, reason)
            return None
        return MeasuredExperts(layer.moe_config, method) if measures_experts() else method

    def _leave_ignored(self, layer: torch.nn.Module, prefix: str, named: list[str], members: list[str]) -> None:
        if named != [prefix] and len(named) < len(members):
            message = (
                f"qwantize: ignore names {_some(named)} but not every member of {prefix} "
                f"({_some(members)}), which share one weight"
            )
            if self.settings.strict:
                raise ValueError(f"{message}; name all of them, or {prefix!r} (strict: true)")
            logger.warning("%s; the whole layer is left unquantized", message)
        self.report.leave(prefix, layer, "ignored", named)

    def _members(self, prefix: str) -> list[str]:
        return fused_members(prefix, self.packed_modules_mapping)


def is_gate(layer: LinearBase, prefix: str) -> bool:
    """Whether a layer decides which experts a token is routed to."""
    return isinstance(layer, ReplicatedLinear) and prefix.rpartition(".")[2] in _GATES


def _some(names: list[str]) -> str:
    """The names, or the first of them where they are many."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _environment() -> dict[str, dict[str, Any]]:
    values = environment_settings()
    return {f"the variable {ENVIRONMENT_VARIABLE}": values} if values else {}
