"""Kernels compiled while a checkpoint loads.

Triton compiles a kernel where it is first launched, one after the other: for a server that is while it captures its
CUDA graphs, some 20 s on an H200's host. What a weight will need is known as soon as its form is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from qwantize_vllm.matmul.compile_process import Request, start_compiling, tell_failure
from qwantize_vllm.matmul.every_kernel import Seen, launch_every, launch_every_normed, launch_every_of_experts
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.triton_launch import Launch

_seen = Seen()


def compile_ahead(
    weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, normed: bool = False, gated: bool = False
) -> threading.Thread | None:
    """Start to compile what multiplies x, of any number of tokens, by this weight on a GPU, in another process.

    Args:
        weight: on the current device.
        dtype: of x, bfloat16 or float16.
        bias: as the products will have it.
        normed: also what norms x, and, if gated, gates the product (normed.py).

    Returns:
        At once: the thread that waits for the process, or None if there is nothing to compile that was not asked for
        before. What fails says so in the log, and where it is launched.
    """

    def note(launch: Launch) -> None:
        launch_every(weight, dtype, bias, launch, _seen)
        if normed:
            launch_every_normed(weight, dtype, bias, gated, launch, _seen)

    return _start(weight.device, note)


def compile_experts_ahead(
    w13: SwizzledExperts, w2: SwizzledExperts, top_k: int, dtype: torch.dtype, activation: str
) -> threading.Thread | None:
    """As `compile_ahead`, what takes x through the experts of a layer; top_k: experts of a token."""
    return _start(
        w2.words.device, lambda launch: launch_every_of_experts(w13, w2, top_k, dtype, activation, launch, _seen)
    )


def _start(device: torch.device, note: Callable[[Launch], None]) -> threading.Thread | None:
    """note: launches what is to be compiled."""
    if device.type != "cuda":
        return None
    request = Request()
    try:
        note(request.launch)
        return start_compiling(request)
    # Whatever it is, it must not end the load: what matters meets the launch too, the rest costs time alone.
    except Exception as error:
        tell_failure(f"{type(error).__name__}: {error}")
        return None
