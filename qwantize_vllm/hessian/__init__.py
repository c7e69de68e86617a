"""Block Hessians H = sum of x x' over the inputs of a block: measure, save, load, slice."""

from qwantize_vllm.hessian.accumulate import BlockHessianSum, block_hessian
from qwantize_vllm.hessian.file import HessianFile, HessianInfo, merge_hessians, save_hessians

__all__ = ["BlockHessianSum", "HessianFile", "HessianInfo", "block_hessian", "merge_hessians", "save_hessians"]
