"""weight -> Nvfp4Tensor: the scale search, its PyTorch reference and its Triton kernels."""

from qwantize_vllm.search.quantize import quantize_nvfp4

__all__ = ["quantize_nvfp4"]
