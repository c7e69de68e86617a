"""What both configs of the plugin are to vLLM: that of unquantized checkpoints, and that of packed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qwantize_vllm.plugin.fingerprint import sources_fingerprint
from qwantize_vllm.settings import QwantizeSettings

METHOD = "qwantize"


class QwantizeBaseConfig(QuantizationConfig):
    """The name, and what it runs on. vLLM makes one per engine and pickles it to the engine's processes."""

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: settings come by other routes."""
        return []


def overriding_file(config: VllmConfig) -> str | None:
    """The settings file that --hf-overrides name. vLLM does not read it where there is a quantization_config."""
    overrides = config.model_config.hf_overrides
    return overrides.get("quantization_config_file") if isinstance(overrides, Mapping) else None


def add_to_compile_key(additional: Any, settings: QwantizeSettings, **more: Any) -> None:
    """Make the settings and our sources part of the key of vLLM's compile cache, which knows additional_config alone of
    both: a graph compiled before an update would call operators that may be others since."""
    if isinstance(additional, dict):
        resolved = settings.model_dump(mode="json", exclude={"cache_dir"})
        additional[f"{METHOD}_resolved"] = {"sources": sources_fingerprint(), **more, **resolved}
