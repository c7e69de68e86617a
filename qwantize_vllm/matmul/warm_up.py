"""Kernels launched before the first request: what a server meets first while somebody waits costs a compilation, or at
least a file of Triton's cache and a module to load.

An engine's first run, of as many tokens as it will ever take, comes before it captures CUDA graphs and answers. With it
all kernels are launched that weights announced here will need, on zeros.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from qwantize_vllm.matmul.compile_process import wait_for_compiling
from qwantize_vllm.matmul.every_kernel import Seen, launch_every, launch_every_normed, launch_every_of_experts
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.launcher import launch_again
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.triton_launch import launch_now

# One of vLLM's loggers where there is vLLM.
logger = logging.getLogger(f"vllm.{__name__}")

# A kind of layer is announced once, so that what a reload brings is not held here.
_announced, _launched = Seen(), Seen()
_waiting: list[Callable[[], None]] = []


def announce(
    weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, normed: bool = False, gated: bool = False
) -> None:
    """Have the next `warm_up` launch every kernel that multiplies x by such a weight on a GPU; arguments as
    `compile_ahead`."""
    kind = (weight.shape, weight.block_size, weight.global_scale.dim(), None if bias is None else bias.dtype)

    def launch() -> None:
        launch_every(weight, dtype, bias, launch_now, _launched)
        if normed:
            launch_every_normed(weight, dtype, bias, gated, launch_now, _launched)

    if weight.device.type == "cuda" and _announced.is_new(weight.device, dtype, normed, gated, *kind):
        _waiting.append(launch)


def announce_experts(
    w13: SwizzledExperts, w2: SwizzledExperts, top_k: int, dtype: torch.dtype, activation: str
) -> None:
    """As `announce`, what takes x through the experts of a layer; top_k: experts of a token."""
    kind = (w13.shape, w2.shape, w2.words.shape[0], w2.block_size, w13.global_scales.shape[1], top_k, activation)
    if w2.words.device.type == "cuda" and _announced.is_new(w2.words.device, dtype, *kind):
        _waiting.append(lambda: launch_every_of_experts(w13, w2, top_k, dtype, activation, launch_again, _launched))


def warm_up() -> None:
    """Launch what was announced, once; nothing while a CUDA graph is being captured. What is being compiled beside is
    not compiled here as well. What cannot be launched is told in the log, and raises where it is needed."""
    if not _waiting or torch.cuda.is_current_stream_capturing():
        return
    wait_for_compiling()
    while _waiting:
        launch = _waiting.pop()
        try:
            launch()
        except Exception as error:
            logger.warning("qwantize: kernels are not launched ahead of requests: %s: %s", type(error).__name__, error)
