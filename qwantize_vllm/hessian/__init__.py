"""Block Hessians H = sum of x x' over the inputs of a block: measure, save, load, slice."""

from qwantize_vllm.hessian.accumulate import block_hessian
from qwantize_vllm.hessian.file import HessianFile, save_hessians

__all__ = ["HessianFile", "block_hessian", "save_hessians"]
