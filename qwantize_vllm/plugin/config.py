"""QwantizeConfig: what `--quantization qwantize` selects.

Every process of vLLM imports this file, with or without our quantization; layers are built in some of them only. What
layers need is imported there: here, half a second of imports would be waited for by all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform
from vllm.utils.system_utils import get_mp_context

from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.plugin.base_config import METHOD, QwantizeBaseConfig, add_to_compile_key
from qwantize_vllm.plugin.fingerprint import config_fingerprint
from qwantize_vllm.plugin.report import LoadReport
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

logger = init_logger(f"vllm.{__name__}")


class QwantizeConfig(QwantizeBaseConfig):
    """Online NVFP4 quantization of every linear layer and of experts.

    vLLM makes one per engine and pickles it to the engine's processes, so until the first layer
    asks for its method it holds nothing but what was given, and the settings that this makes.
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
        self._settings_so_far, _ = resolve_settings({source: self._given, **_environment()}, look_for_files)

    def maybe_update_config(self, *args: Any, **kwargs: Any) -> None:
        """vLLM calls it once it knows that the GPU is one of ours, seconds before the engine has processes that load.

        Where the engine has none of its own, or this is one (a draft model's config is made there), layers come too
        soon for what is started here.
        """
        if not current_platform.is_cuda() or not envs.VLLM_ENABLE_V1_MULTIPROCESSING or torch.cuda.is_initialized():
            return
        if (capability := current_platform.get_device_capability()) is not None:
            from qwantize_vllm.plugin.search_process import start_search_process

            fork = get_mp_context().get_start_method() == "fork"  # as vLLM's own processes are started
            start_search_process(self._settings_so_far, capability.to_int(), fork)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, **kwargs: Any) -> Any:
        """With --quantization qwantize, a checkpoint that is NVFP4 already is ours; others are refused by name."""
        if user_quant != METHOD or not hf_quant_cfg or hf_quant_cfg.get("quant_method") == METHOD:
            return None
        from qwantize_vllm.plugin.packed_format import packed_of

        packed_of(hf_quant_cfg)
        return METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QwantizeBaseConfig:
        if config.get("quant_method") != METHOD or config.get("packed"):
            from qwantize_vllm.plugin.packed import PackedConfig

            return PackedConfig(config)
        return cls({key: value for key, value in config.items() if key != "quant_method"})

    @classmethod
    def from_config_file(cls, config_file: str) -> QwantizeConfig:
        return cls(read_settings_file(config_file), source=config_file)

    @property
    def settings(self) -> QwantizeSettings:
        """The settings of all sources; the first access must be while vLLM builds the model."""
        if self._resolved is None:
            from qwantize_vllm.plugin.fusion import install_fusion
            from qwantize_vllm.plugin.invariance import check_backend
            from qwantize_vllm.plugin.refusals import refuse_unordered_load, refuse_unread_file, refuse_unsupported

            config = get_current_vllm_config()
            refuse_unsupported(config)
            refuse_unordered_load(config)
            if self._source == _CHECKPOINT:
                refuse_unread_file(config, self._given)
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
            check_backend(self._resolved)
            add_to_compile_key(additional, self._resolved)
            install_fusion(config, self._resolved)
        return self._resolved

    @property
    def report(self) -> LoadReport:
        """What is quantized and what is left, logged once the last layer is done."""
        if self._report is None:
            self._report = LoadReport(self.settings)
        return self._report

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from qwantize_vllm.plugin.methods import choose_method

        return choose_method(self, layer, prefix)


def _environment() -> dict[str, dict[str, Any]]:
    values = environment_settings()
    return {f"the variable {ENVIRONMENT_VARIABLE}": values} if values else {}
