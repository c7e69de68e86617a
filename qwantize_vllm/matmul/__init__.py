"""x, Nvfp4Tensor -> x . W': the reference, the backends, and who serves which number of tokens."""

from qwantize_vllm.matmul.multiply import matmul_nvfp4

__all__ = ["matmul_nvfp4"]
