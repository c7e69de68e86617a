"""The kernels that quantize layers, compiled by a process of its own from the moment that an engine is configured.

The engine then starts processes and imports what they need, for seconds. Where the kernels are compiled later, beside
the load (rehearsal.py), the first layer waits for them, and they keep Python's lock from the thread that loads. They
are compiled for layers of bfloat16 with the settings that are known by then; for others they are compiled later.

    python -m qwantize_vllm.plugin.search_process < asked    # what `start_search_process` writes
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from qwantize_vllm.matmul.compile_process import NICENESS, Target, is_done, mark_done
from qwantize_vllm.plugin.fingerprint import sources_fingerprint
from qwantize_vllm.plugin.search_kernels import ROWS, THREADS, has_search_kernels, submit_searches
from qwantize_vllm.settings import QwantizeSettings
from qwantize_vllm.side_process import run_module

# One of vLLM's loggers.
logger = logging.getLogger(f"vllm.{__name__}")

_COLUMNS = 4096  # of a layer; Triton compiles apart for sizes that are no multiples of 16, or whose tiles are not
_LONGEST = 120.0  # seconds of a fork, which may have inherited a lock that nobody opens
_thread: threading.Thread | None = None  # which waits for the process


def start_search_process(settings: QwantizeSettings, capability: int, fork: bool) -> threading.Thread | None:
    """Start it for an NVIDIA GPU, once in a process, unless an earlier start has compiled the kernels.

    capability: the GPU's compute capability, 90 for Hopper; nothing here needs the GPU. fork: have a fork of this
    process do it, which has imported PyTorch and Triton: an engine that is a fork too loads after three seconds, one
    that is not imports as much as a new process does. Returns the thread that waits for the process. What fails to
    compile, or to start, fails beside the load too; a line in the log says it here.
    """
    global _thread
    if _thread is not None or not has_search_kernels(settings):
        return None
    try:
        given = settings.model_dump(mode="json", include={"scale_search", "block_size", "backend"})
        asked = {"settings": given, "target": ["cuda", capability, 32], "sources": sources_fingerprint()}
        if is_done(asked):
            return None
        wait = _fork(asked) if fork else functools.partial(run_module, __name__, asked)
        thread = threading.Thread(target=_run, args=(wait,), name="qwantize-search-process", daemon=True)
        thread.start()
    # Whatever it is, as no memory for a fork: it costs time alone, and must not end the start of the engine.
    except Exception as error:
        _tell_failure(f"{type(error).__name__}: {error}")
        return None
    _thread = thread
    return thread


def _fork(asked: dict[str, Any]) -> Callable[[], str]:
    """Start a fork; returns what waits for it, and returns why it failed. Should it fail to compile, it prints that."""
    process = multiprocessing.get_context("fork").Process(target=compile_searches, args=(asked,), daemon=True)
    process.start()

    def wait() -> str:
        process.join(_LONGEST)
        if process.is_alive():
            process.kill()
            process.join()
        return f"the process ended with {process.exitcode}" if process.exitcode else ""

    return wait


def _run(wait: Callable[[], str]) -> None:
    if failed := wait():
        _tell_failure(failed)


def _tell_failure(why: str) -> None:
    logger.info("qwantize: the kernels that quantize layers will be compiled while they are loaded: %s", why)


def compile_searches(asked: dict[str, Any]) -> None:
    """What the process does."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    os.nice(NICENESS)
    driver.set_active(Target(GPUTarget(*asked["target"])))
    settings = QwantizeSettings(**asked["settings"])
    weight = torch.empty(ROWS, _COLUMNS, dtype=torch.bfloat16, device="meta")
    with ThreadPoolExecutor(THREADS) as pool:
        pool.submit(_compile_driver)
        triton_key()  # which each thread would make for itself
        for job in submit_searches(settings, weight, pool):
            job.result()
    mark_done(asked)


def _compile_driver() -> None:
    """What Triton's driver has in C, which is compiled when a process first uses a GPU. What fails here, as without a
    GPU's libraries, fails there too, and says so."""
    from triton.backends.nvidia.driver import CudaUtils

    with contextlib.suppress(Exception):
        CudaUtils()


if __name__ == "__main__":
    compile_searches(json.load(sys.stdin))
