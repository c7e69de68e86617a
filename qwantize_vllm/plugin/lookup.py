"""vLLM's look-up of a quantization method by its name, with a short way to ours.

To answer, vLLM imports all methods that it has, with the models and libraries that these want. It does so in the
process that the user starts, where nothing else needs them, while everybody waits.
"""

from __future__ import annotations

import functools

from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qwantize_vllm.plugin.base_config import METHOD


def answer_at_once(config: type[QuantizationConfig]) -> None:
    """Have vLLM's look-up of METHOD answer with `config`; may be called more than once.

    Who has imported the look-up before goes vLLM's long way, to the same answer.
    """
    look_up = quantization.get_quantization_config
    if hasattr(look_up, "shortened_by_qwantize"):
        return

    @functools.wraps(look_up)
    def shortened(name: str) -> type[QuantizationConfig]:
        return config if name == METHOD else look_up(name)

    shortened.shortened_by_qwantize = True  # type: ignore[attr-defined]
    quantization.get_quantization_config = shortened
