"""VLLM_BATCH_INVARIANT=1: the result of a row does not depend on the rows beside it.

In bfloat16 and float16 a GPU's weights have a kernel of this package for that, which `auto` takes (matmul_swizzled_op,
experts_swizzled_op). What is multiplied densely is vLLM's own to keep invariant: it puts products of its own in place
of PyTorch's.
"""

from __future__ import annotations

from vllm import envs

from qwantize_vllm.settings import QwantizeSettings

# Their order of sums depends on the number of rows; "vllm" is Marlin, or a kernel that rounds activations. vLLM asks
# Humming for a mode of its own.
_NOT_INVARIANT = ("vllm", "marlin", "fused")


def check_backend(settings: QwantizeSettings) -> None:
    """See that batch invariance is not asked of a backend that cannot give it.

    Raises:
        ValueError: it is.
    """
    if envs.VLLM_BATCH_INVARIANT and settings.backend in _NOT_INVARIANT:
        raise ValueError(
            f"qwantize: VLLM_BATCH_INVARIANT=1 asks for results that do not depend on the batch, which backend "
            f"{settings.backend!r} does not give: leave the setting backend out, or unset the variable"
        )


def swizzled_backend() -> str:
    """Of the ops for swizzled weights."""
    return "batch_invariant" if envs.VLLM_BATCH_INVARIANT else "auto"


def plain_backend(backend: str, on_gpu: bool) -> str:
    """Of the ops for codes and scales as they are, by the setting; vLLM has this mode on GPUs only."""
    return "dequantize" if envs.VLLM_BATCH_INVARIANT and on_gpu and backend == "auto" else backend
