"""PackedConfig: what serves checkpoints that hold NVFP4 already, without searching anything.

Which layers those are is asked of vLLM's own classes for the format, so that targets, ignored modules, fused layers and
renamed ones mean here what they mean there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint
from qwantize_vllm.checkpoint.export import NOTES, verify
from qwantize_vllm.plugin.addresses import keep_latent_projections
from qwantize_vllm.plugin.base_config import METHOD, QwantizeBaseConfig, add_to_compile_key, overriding_file
from qwantize_vllm.plugin.fusion import install_fusion
from qwantize_vllm.plugin.invariance import check_backend
from qwantize_vllm.plugin.moe import expert_members, why_not_experts
from qwantize_vllm.plugin.packed_experts import PackedMoEMethod
from qwantize_vllm.plugin.packed_format import Packed, packed_of
from qwantize_vllm.plugin.packed_linear import PackedLinearMethod
from qwantize_vllm.plugin.refusals import refuse_unsupported
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.settings import QwantizeSettings, environment_settings, resolve_settings

logger = init_logger(f"vllm.{__name__}")
_USED = ("backend", "fuse_norms", "strict")  # of the settings, those that still say something
_UNPACKED_BY_MODELOPT = ("vision_tower", "vision_model", "vit_large_projector")  # whatever its config says


class PackedConfig(QwantizeBaseConfig):
    """What QwantizeConfig makes of a checkpoint that is NVFP4 already. Pickled to the engine's processes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError where the checkpoint is quantized otherwise: see `packed_of`."""
        super().__init__()
        self.packed = packed_of(config)
        self._theirs = _theirs(self.packed, config)
        self._resolved: QwantizeSettings | None = None
        self._report: LoadReport | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._theirs.apply_vllm_mapper(hf_to_vllm_mapper)

    @property
    def settings(self) -> QwantizeSettings:
        """Of `--additional-config` and QWANTIZE_CONFIG, what still matters; first while vLLM builds the model."""
        if self._resolved is None:
            config = get_current_vllm_config()
            refuse_unsupported(config)
            additional = config.additional_config
            extra = additional.get(METHOD, {}) if isinstance(additional, dict) else {}
            _, origin = resolve_settings({"--additional-config": extra, "QWANTIZE_CONFIG": environment_settings()})
            values = {**environment_settings(), **extra}
            used = {key: values[key] for key in _USED if key in values}
            self._resolved, _ = resolve_settings({"the settings": {**used, "block_size": self.packed.block_size}})
            logger.info("qwantize: the checkpoint is NVFP4 already (%s); nothing is searched", self.packed.layout.name)
            unused = [f"{key} (from {source})" for key, source in origin.items() if key not in _USED]
            if (file := overriding_file(config)) is not None:
                unused.append(f"the file {file} (from --hf-overrides)")
            if unused:
                logger.warning("qwantize: without effect on such a checkpoint: %s", ", ".join(unused))
            if self.packed.activations:
                logger.warning(
                    "qwantize: the checkpoint asks for activations of four bits too (W4A4); they stay as they are"
                )
            _look_at_files(config, self._resolved.strict)
            check_backend(self._resolved)
            add_to_compile_key(additional, self._resolved, packed=self.packed.layout.name)
            install_fusion(config, self._resolved)
        return self._resolved

    @property
    def report(self) -> LoadReport:
        if self._report is None:
            self._report = LoadReport(self.settings, self.packed.layout.name)
        return self._report

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Raises ValueError where the head is NVFP4, or experts are that are not served from codes; names them."""
        self._theirs.packed_modules_mapping = self.packed_modules_mapping
        keep_latent_projections(layer)
        if isinstance(layer, (Attention, MLAAttention)) and self._has_cache_scales():
            return self._theirs.get_quant_method(layer, prefix)
        is_layer = isinstance(layer, (LinearBase, RoutedExperts))
        if (is_layer or isinstance(layer, ParallelLMHead)) and self._is_packed(layer, prefix):
            return self._packed_method(layer, prefix)
        kind = "embedding or head" if isinstance(layer, VocabParallelEmbedding) else type(layer).__name__
        self.report.leave(prefix, layer, "not quantized in the checkpoint" if is_layer else kind)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _packed_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase:
        if isinstance(layer, LinearBase):
            return PackedLinearMethod(self.settings, prefix, self.report, self.packed)
        reason: str | None = "only linear layers and experts are served from codes"
        if isinstance(layer, RoutedExperts) and (reason := why_not_experts(layer.moe_config, self.settings)) is None:
            return PackedMoEMethod(self.settings, prefix, self.report, layer.moe_config, self.packed)
        raise ValueError(
            f"qwantize: {prefix} ({type(layer).__name__}) is NVFP4 in this checkpoint, which qwantize cannot serve: "
            f"{reason}; leave --quantization out to have vLLM serve it"
        )

    def _has_cache_scales(self) -> bool:
        """Whether the checkpoint has scales of an FP8 KV cache, which are vLLM's to load."""
        names = ("kv_cache_scheme", "kv_cache_quant_algo")  # of compressed-tensors, of ModelOpt
        return any(getattr(self._theirs, name, None) for name in names)

    def _is_packed(self, layer: torch.nn.Module, prefix: str) -> bool:
        if isinstance(self._theirs, ModelOptNvFp4Config):
            by_name = any(name in prefix for name in _UNPACKED_BY_MODELOPT)
            return not (by_name or self._theirs.is_layer_excluded(prefix))
        if isinstance(layer, RoutedExperts):
            return self._has_packed_experts(layer, prefix)
        try:
            return self._has_weights(layer, prefix)
        except ValueError:  # vLLM's way to say that no target matches
            if isinstance(layer, ParallelLMHead):
                return False
            raise

    def _has_packed_experts(self, layer: RoutedExperts, prefix: str) -> bool:
        """Targets and ignored names are those of experts' projections; vLLM asks for the first expert's.

        Raises:
            ValueError: some of them are quantized, others not.
        """
        self._theirs._add_fused_moe_to_target_scheme_map()
        names = expert_members(layer, prefix)[:3]  # gate, up and down
        packed = {name: self._has_weights(layer, name) for name in names}
        if len(set(packed.values())) > 1:
            raise ValueError(
                f"qwantize: {prefix} is NVFP4 in parts only: {packed}; all of its experts must be, or none"
            )
        return all(packed.values())

    def _has_weights(self, layer: torch.nn.Module, name: str) -> bool:
        scheme = self._theirs.get_scheme_dict(layer, name)
        return bool(scheme and scheme.get("weights"))


def _look_at_files(config: Any, strict: bool) -> None:
    """Of a directory, the headers before anything is built from them; with strict the bytes of an export of ours too.

    Raises:
        ValueError: a file is damaged or missing; names it, and where it is known the tensor.
    """
    directory = Path(config.model_config.model)
    if not directory.is_dir() or config.load_config.load_format not in ("auto", "safetensors", "hf"):
        return
    Checkpoint(directory)
    if strict and (directory / NOTES).is_file():
        logger.info("qwantize: %d tensors are what was exported (strict: true)", verify(directory))


def _theirs(packed: Packed, config: Mapping[str, Any]) -> Any:
    """vLLM's own object for the format, asked what is quantized; of its kernels it is asked for none."""
    config = copy.deepcopy(dict(config))
    if packed.layout.name == "qwantize":
        config = LAYOUTS["compressed-tensors"].config(config.get("ignore", []), 16)
    if packed.layout.name != "modelopt":
        return CompressedTensorsConfig.from_config(config)
    inner = config.get("quantization", config)
    inner["quant_algo"] = "NVFP4"  # any that this vLLM knows
    inner.setdefault("kv_cache_quant_algo", None)
    inner.setdefault("exclude_modules", [])
    inner.setdefault("group_size", 16)
    return ModelOptNvFp4Config.from_config(config)
