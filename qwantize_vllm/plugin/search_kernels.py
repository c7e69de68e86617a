"""The kernels that quantize a layer, compiled together in threads, into Triton's cache.

Nothing is loaded: neither the kernels nor their launchers (matmul/triton_launchers.py).
"""

from __future__ import annotations

import functools
from concurrent.futures import Executor, Future
from typing import Any

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.settings import QwantizeSettings
from qwantize_vllm.triton_launch import Launch, compile_now

THREADS = 5  # as many as there are kernels
# Rows of a layer: so many that its sizes are multiples of 16 as those of real ones, for which Triton compiles.
ROWS = 1024


def has_search_kernels(settings: QwantizeSettings) -> bool:
    """Whether these are the kernels that layers take: a search with Hessians has others."""
    return settings.scale_search != "hessian"


def submit_searches(settings: QwantizeSettings, weight: torch.Tensor, pool: Executor) -> list[Future[None]]:
    """Have all of them compiled, for the GPU of Triton's driver; weight (N, K): on a GPU, or on the meta device."""
    jobs: list[Future[None]] = []

    def launch(*launched: Any, **constants: Any) -> None:
        jobs.append(pool.submit(_compile, *launched, **constants))

    _launch_each(settings, weight, launch)
    return jobs


def _launch_each(settings: QwantizeSettings, weight: torch.Tensor, launch: Launch) -> None:
    """Each kernel once, for a weight (N, K); what they write is not initialized."""
    from qwantize_vllm.search.triton_amax import matrix_amax_triton
    from qwantize_vllm.search.triton_quality import signal_and_noise_triton
    from qwantize_vllm.search.triton_sse import search_sse

    matrix_amax_triton(weight[None], launch)
    q = _empty_quantized(weight, settings.block_size)
    search_sse(weight[None], q.global_scale[None], settings.block_size, settings.scale_search == "optimal", launch)
    signal_and_noise_triton(weight, q, launch)
    if settings.backend == "auto":
        swizzle(q, launch)


def _compile(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    from qwantize_vllm.matmul.triton_launchers import build_launcher

    build_launcher(compile_now(kernel, grid, *arguments, **constants))


def _empty_quantized(weight: torch.Tensor, block_size: int) -> Nvfp4Tensor:
    n, k = weight.shape
    empty = functools.partial(torch.empty, device=weight.device)
    scales = empty(n, k // block_size, dtype=torch.float8_e4m3fn)
    return Nvfp4Tensor(empty(n, k // 2, dtype=torch.uint8), scales, empty((), dtype=torch.float32), block_size)
