"""A layer that is quantized for nothing, in a thread, while vLLM builds the model and opens its files.

The first layer that a process quantizes takes it a second, and with no compiled kernels at hand several: Triton is
imported, reads all of itself to know its version (half a second; Python's lock is not held meanwhile), compiles or
loads kernels, and CUDA loads each of PyTorch's that is used for the first time. None of it needs the weights, and
kernels that are not in Triton's cache by then (search_process.py) are compiled at the same time, in threads.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from vllm.logger import init_logger

from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.plugin.search_kernels import ROWS, THREADS, has_search_kernels, submit_searches
from qwantize_vllm.search.quality import signal_and_noise
from qwantize_vllm.search.quantize import GlobalScale, quantize_nvfp4
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")

_thread: threading.Thread | None = None


def begin_rehearsal(settings: QwantizeSettings, k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Start it on a GPU, once in a process; returns at once.

    k: columns of a layer. dtype, device: of its weight, once that is there. A search with Hessians, whose kernels are
    others, is not rehearsed.
    """
    global _thread
    if _thread is not None or not has_search_kernels(settings) or device.type != "cuda":
        return
    thread = threading.Thread(target=_rehearse, args=(settings, k, dtype, device), name="qwantize-rehearsal")
    try:
        thread.start()
    except RuntimeError as error:  # as many threads as there may be
        _tell_failure(error)
        return
    _thread = thread


def end_rehearsal() -> None:
    """Wait for it, before kernels are launched here: a process compiles nothing twice, and one thread at a time loads
    kernels (matmul/triton_launchers.py says why)."""
    if _thread is not None:
        _thread.join()


def _rehearse(settings: QwantizeSettings, k: int, dtype: torch.dtype, device: torch.device) -> None:
    """What fails here will fail again with a layer, and stop the start there, with the layer's name.

    Tensors made here are not in the memory that vLLM's sleep mode takes away: its pool is that of the main thread.
    """
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.no_grad():
            weight = torch.zeros(ROWS, k, dtype=dtype, device=device)
            if device.type == "cuda":
                compile_together(settings, weight)
            rehearse(settings, weight)
    except Exception as error:
        _tell_failure(error)


def _tell_failure(error: Exception) -> None:
    logger.info("qwantize: a layer was rehearsed in vain, which costs time alone: %s: %s", type(error).__name__, error)


def rehearse(settings: QwantizeSettings, weight: torch.Tensor) -> None:
    """Everything that is done with the weight (N, K) of a layer."""
    scale: GlobalScale = "none" if settings.global_scale == "none" else "amax"
    q = quantize_nvfp4(weight, settings.scale_search, settings.block_size, scale)
    signal_and_noise(weight, q)
    if settings.backend == "auto":
        swizzle(q)


def compile_together(settings: QwantizeSettings, weight: torch.Tensor) -> None:
    """Compile what `rehearse` launches for a weight (N, K) on a GPU, all at once."""
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    # Triton compiles for the current device of a thread.
    with ThreadPoolExecutor(THREADS, initializer=torch.cuda.set_device, initargs=(weight.device,)) as pool:
        # Two that all compilations need, and each thread would make for itself: Triton's version, and meanwhile the
        # driver, a part of which is compiled from C.
        version = pool.submit(triton_key)
        driver.active.get_current_target()
        version.result()
        for job in submit_searches(settings, weight, pool):
            job.result()
