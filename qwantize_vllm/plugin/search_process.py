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
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from qwantize_vllm.matmul.compile_process import NICENESS, Target, is_done, mark_done
from qwantize_vllm.module_process import run_module
from qwantize_vllm.plugin.fingerprint import sources_fingerprint
from qwantize_vllm.plugin.search_kernels import ROWS, THREADS, has_search_kernels, submit_searches
from qwantize_vllm.settings import QwantizeSettings

# One of vLLM's loggers.
logger = logging.getLogger(f"vllm.{__name__}")

_COLUMNS = 4096  # of a layer; any K is as good that has 16 blocks or a multiple of them
_thread: threading.Thread | None = None  # which waits for the process


def start_search_process(settings: QwantizeSettings, capability: int, fork: bool) -> threading.Thread | None:
    """Start it for an NVIDIA GPU, once in a process, unless an earlier start has compiled the kernels.

    capability: the GPU's compute capability, 90 for Hopper; nothing here needs the GPU. fork: have a fork of this
    process do it, which has imported all it needs: an engine that is a fork loads after three seconds, one that is not
    imports as much as a new process does. Returns the thread that waits for the process. What fails to compile fails
    beside the load too; a line in the log says it here.
    """
    global _thread
    if _thread is not None or not has_search_kernels(settings):
        return None
    given = settings.model_dump(mode="json", include={"scale_search", "block_size", "backend"})
    asked = {"settings": given, "target": ["cuda", capability, 32], "sources": sources_fingerprint()}
    try:
        if is_done(asked):
            return None
        work = functools.partial(_wait_for, _fork(asked)) if fork else functools.partial(_run, asked)
    # Whatever it is, as no memory for a fork, it must not end the start: it costs time alone.
    except Exception as error:
        _tell_failure(f"{type(error).__name__}: {error}")
        return None
    _thread = threading.Thread(target=work, name="qwantize-search-process", daemon=True)
    _thread.start()
    return _thread


def _wait_for(process: int) -> None:
    with contextlib.suppress(ChildProcessError):  # somebody who waits for every child has seen its end
        os.waitpid(process, 0)


def _fork(asked: dict[str, Any]) -> int:
    if process := os.fork():
        return process
    try:
        os.nice(NICENESS)
        compile_searches(asked)
    except Exception as error:
        _tell_failure(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)  # nothing of the process that it was


def _run(asked: dict[str, Any]) -> None:
    if failed := run_module(__name__, asked):
        _tell_failure(failed)


def _tell_failure(why: str) -> None:
    logger.info("qwantize: the kernels that quantize layers will be compiled while they are loaded: %s", why)


def compile_searches(asked: dict[str, Any]) -> None:
    """What the process does."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    settings, weight = QwantizeSettings(**asked["settings"]), torch.empty(ROWS, _COLUMNS, device="meta")
    driver.set_active(Target(GPUTarget(*asked["target"])))
    with ThreadPoolExecutor(THREADS) as pool:
        jobs: list[Future[Any]] = list(submit_searches(settings, weight.bfloat16(), pool))
        if torch.cuda.is_available():
            jobs.append(pool.submit(_compile_driver))
        for job in jobs:
            job.result()
    mark_done(asked)


def _compile_driver() -> None:
    """What Triton's driver has in C, which is compiled when a process first uses a GPU."""
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()


if __name__ == "__main__":
    os.nice(NICENESS)
    compile_searches(json.load(sys.stdin))
