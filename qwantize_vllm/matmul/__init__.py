"""x, Nvfp4Tensor -> x . W': the reference, the backends, and who serves which number of tokens."""

from qwantize_vllm.matmul.multiply import matmul_nvfp4
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4, swizzle, unswizzle

__all__ = ["SwizzledNvfp4", "matmul_nvfp4", "swizzle", "unswizzle"]
