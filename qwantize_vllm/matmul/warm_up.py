"""Kernels launched before the first request: what a server meets first while somebody waits costs a compilation, or at
least a file of Triton's cache and a module to load.

An engine's first run, of as many tokens as it will ever take, comes before it captures CUDA graphs and answers. With it
the other kernels of a weight are launched too, on zeros.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from qwantize_vllm.matmul.compile_process import wait_for_compiling
from qwantize_vllm.matmul.every_kernel import Seen, launch_every, launch_every_normed, launch_every_of_experts
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.launcher import launch_again
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.triton_launch import launch_now

_begun, _launched = Seen(), Seen()


def warm_up(weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None) -> None:
    """Launch every kernel that multiplies x by weights of this kind on a GPU, the first time that one is met outside
    the capture of a CUDA graph.

    dtype: of x, bfloat16 or float16. bias: (N,) or None.
    """
    if _is_due(*_kind(weight, dtype, bias)):
        launch_every(weight, dtype, bias, launch_now, _launched)


def warm_up_normed(weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, gated: bool) -> None:
    """As `warm_up`, what norms x and, if gated, gates the product."""
    if _is_due(*_kind(weight, dtype, bias), "gated" if gated else "normed"):
        launch_every_normed(weight, dtype, bias, gated, launch_now, _launched)


def warm_up_experts(w13: SwizzledExperts, w2: SwizzledExperts, top_k: int, dtype: torch.dtype, activation: str) -> None:
    """As `warm_up`, what takes x through the experts of a layer; top_k: experts of a token."""
    kind = (w13.words.device, dtype, top_k, activation, w13.shape, w2.shape, len(w13.words), w13.block_size)
    if _is_due(*kind, w13.global_scales.shape[1]):
        launch_every_of_experts(w13, w2, top_k, dtype, activation, launch_again, _launched)


def _kind(weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None) -> tuple[Hashable, ...]:
    of_bias, members = None if bias is None else bias.dtype, weight.global_scale.dim()
    return (weight.device, dtype, of_bias, weight.shape, weight.block_size, members)


def _is_due(*kind: Hashable) -> bool:
    """Whether it has not been launched for such a kind and can be; what is being compiled beside is not compiled here
    as well."""
    if torch.cuda.is_current_stream_capturing() or not _begun.is_new(*kind):
        return False
    wait_for_compiling()
    return True
