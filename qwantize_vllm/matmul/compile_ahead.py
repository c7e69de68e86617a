"""Kernels compiled while a checkpoint loads.

Triton compiles a kernel where it is first launched, one after the other: for a server that is while it captures its
CUDA graphs, some 20 s on an H200's host. What a weight will need is known as soon as its form is.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

from qwantize_vllm.matmul.compile_process import Request, start_compiling, tell_failure
from qwantize_vllm.matmul.every_kernel import Kernels

_asked_for: set[Hashable] = set()


def compile_ahead(kernels: Kernels) -> threading.Thread | None:
    """Start to compile these kernels, if they are a GPU's and of a kind that is new, in another process.

    Returns:
        At once: the thread that waits for the process, or None if there is nothing to compile that was not asked for
        before. What fails says so in the log, and where it is launched.
    """
    if kernels.device.type != "cuda" or kernels.kind in _asked_for:
        return None
    _asked_for.add(kernels.kind)
    request = Request()
    try:
        kernels.launch_all(request.launch)
        return start_compiling(request)
    # Whatever it is, it must not end the load: what matters meets the launch too, the rest costs time alone.
    except Exception as error:
        tell_failure(f"{type(error).__name__}: {error}")
        return None
