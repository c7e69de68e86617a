"""vLLM's own weight-only NVFP4 kernels, fed with the codes and scales of this package.

Written from the sources of vLLM 0.25.1 and 0.32.0. In both a kernel is a class of
`vllm.model_executor.kernels.linear.nvfp4` that takes a layer with `weight`, `weight_scale` and a `weight_global_scale`
to multiply by, repacks them once and then multiplies; its base class says so, and hides what differs between versions.
Nothing of vLLM is imported before a function is called.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from qwantize_vllm.plugin.versions import KERNEL_NEEDS, installed

_KERNELS = "vllm.model_executor.kernels.linear.nvfp4"
# The module of each below that folder, and its class.
_CLASSES = {"marlin": "MarlinNvFp4LinearKernel", "humming": "HummingNvFp4LinearKernel"}
KERNELS = tuple(_CLASSES)
BLOCK_SIZE = 16


def why_not(kernel: str) -> str | None:
    """Why a kernel of KERNELS cannot run here, in a line; None where it can. Never raises."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    try:
        for package, distribution in KERNEL_NEEDS[kernel].items():
            if importlib.util.find_spec(package) is None:
                return f"{distribution} is not installed"
        supported, reason = _kernel_class(kernel).is_supported()
    except Exception as error:  # another vLLM may have moved, renamed or broken anything, here that is but a reason
        return f"not as expected in vLLM {installed()}: {type(error).__name__}: {error}".splitlines()[0]
    return None if supported else reason or "not supported on this GPU"


class PreparedWeight:
    """A weight (N, K) in the layout of one kernel of vLLM."""

    def __init__(
        self,
        kernel: str,
        codes: torch.Tensor,
        block_scales: torch.Tensor,
        global_scale: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Repack copies of the tensors of an unbatched Nvfp4Tensor with blocks of 16.

        kernel: see `make_kernel`. dtype: of x, bfloat16 or float16.

        Raises:
            ValueError: the weight is batched, or has other blocks; the kernel cannot run here.
        """
        n, k = codes.shape[0], 2 * codes.shape[-1]
        if codes.dim() != 2 or tuple(block_scales.shape) != (n, k // BLOCK_SIZE):
            raise ValueError(
                f"{kernel} takes an unbatched weight with blocks of {BLOCK_SIZE}, "
                f"got codes {tuple(codes.shape)} and scales {tuple(block_scales.shape)}"
            )
        self._layer = _layer(codes, block_scales, global_scale, dtype)
        self._kernel = make_kernel(kernel)
        self._kernel.process_weights_after_loading(self._layer)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., K) . W' + bias -> (..., N) in x's dtype, which is the one prepared for."""
        y = self._kernel.apply_weights(self._layer, x.contiguous(), None)
        # The kernels want a bias repacked with the weight, each in its own way: added here it is the same for all.
        return y if bias is None else y + bias.to(y.dtype)


def _layer(
    codes: torch.Tensor, block_scales: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.nn.Module:
    """A layer that the kernels take for one of vLLM's, without tensor parallelism."""
    layer = torch.nn.Module()
    describe(layer, codes.shape[0], 2 * codes.shape[1], dtype)
    tensors = {"weight": codes, "weight_scale": block_scales, "weight_global_scale": global_scale}
    for name, tensor in tensors.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    return layer


def describe(layer: torch.nn.Module, n: int, k: int, dtype: torch.dtype) -> None:
    """Give a layer the attributes that the kernels look at, as far as it has not got them."""
    sizes: dict[str, Any] = {
        "input_size": k,
        "input_size_per_partition": k,
        "output_size": n,
        "output_size_per_partition": n,
        "output_partition_sizes": [n],
        "logical_widths": [n],
        "params_dtype": dtype,
        "has_bias": False,
    }
    for name, size in sizes.items():
        if not hasattr(layer, name):
            setattr(layer, name, size)


def make_kernel(kernel: str) -> Any:
    """A kernel of KERNELS, or "vllm": the one that vLLM selects here for weights of four bits and activations of 16.

    Raises:
        ValueError: it cannot run here.
    """
    if kernel == "vllm":
        return importlib.import_module("vllm.model_executor.kernels.linear").init_nvfp4_linear_kernel(use_a16=True)
    if reason := why_not(kernel):
        raise ValueError(f"backend {kernel!r} {reason}")
    return _kernel_class(kernel)(importlib.import_module(f"{_KERNELS}.base").NvFp4LinearLayerConfig())


def _kernel_class(kernel: str) -> Any:
    return getattr(importlib.import_module(f"{_KERNELS}.{kernel}"), _CLASSES[kernel])
