"""The only folder that imports vLLM: registration, config, linear method, load report."""

from __future__ import annotations


def register() -> None:
    """Entry point of group `vllm.general_plugins`: vLLM calls it in every process."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from qwantize_vllm.plugin.base_config import METHOD
    from qwantize_vllm.plugin.config import QwantizeConfig
    from qwantize_vllm.plugin.lookup import answer_at_once
    from qwantize_vllm.plugin.towers import watch_towers
    from qwantize_vllm.plugin.versions import warn_if_untested

    register_quantization_config(METHOD)(QwantizeConfig)
    answer_at_once(QwantizeConfig)
    watch_towers()
    warn_if_untested()
