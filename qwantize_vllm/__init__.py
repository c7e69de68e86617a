"""NVFP4 quantization with optimal block scales, and a vLLM plugin that serves from it."""

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.hessian import block_hessian
from qwantize_vllm.matmul import matmul_nvfp4, swizzle
from qwantize_vllm.search import quantize_nvfp4
from qwantize_vllm.settings import QwantizeSettings

__version__ = "0.1.0"

__all__ = ["Nvfp4Tensor", "QwantizeSettings", "block_hessian", "matmul_nvfp4", "quantize_nvfp4", "swizzle"]
