"""Kernels launched before the first request: what a server meets first while somebody waits costs a compilation, or at
least a file of Triton's cache and a module to load.

An engine's first run, of as many tokens as it will ever take, comes before it captures CUDA graphs and answers. With
its first product all kernels are launched that layers announced here will need. With latent attention that is earlier,
at the end of the load, where vLLM multiplies an identity by a projection's weight to take it apart.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch

from qwantize_vllm.matmul.compile_process import wait_for_compiling
from qwantize_vllm.matmul.every_kernel import Kernels
from qwantize_vllm.triton_launch import launch_now

# One of vLLM's loggers where there is vLLM.
logger = logging.getLogger(f"vllm.{__name__}")

_announced: set[Hashable] = set()
_waiting: list[Kernels] = []


def announce(kernels: Kernels) -> None:
    """Have the next `warm_up` launch them, if they are a GPU's. Their tensors are held until then: those of one layer
    of each kind, and none of what a reload brings."""
    if kernels.device.type == "cuda" and kernels.kind not in _announced:
        _announced.add(kernels.kind)
        _waiting.append(kernels)


def warm_up() -> None:
    """Launch what was announced, once; nothing while a CUDA graph is being captured. What is being compiled beside is
    not compiled here as well. What cannot be launched is told in the log, and raises where it is needed."""
    if not _waiting or torch.cuda.is_current_stream_capturing():
        return
    wait_for_compiling()
    while _waiting:
        kernels = _waiting.pop()
        try:
            kernels.launch_all(launch_now)
        # Whatever it is: a shape that no request may ever need must not end the start.
        except Exception as error:
            logger.warning("qwantize: kernels are not launched ahead of requests: %s: %s", type(error).__name__, error)
