"""Hessians H = sum of x x' over a layer's inputs, by blocks or whole: measure, save, load, slice."""

from qwantize_vllm.hessian.accumulate import BlockHessianSum, FullHessianSum, block_hessian
from qwantize_vllm.hessian.file import HessianFile, HessianInfo, merge_hessians, save_hessians

__all__ = [
    "BlockHessianSum",
    "FullHessianSum",
    "HessianFile",
    "HessianInfo",
    "block_hessian",
    "merge_hessians",
    "save_hessians",
]
