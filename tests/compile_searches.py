"""Have another process compile what quantizes a layer, and find it in Triton's cache; needs no GPU.

    python -m tests.compile_searches naive|optimal 16|32 fork|module

A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported. Prints the
name of every kernel that was in the cache.
"""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.plugin import search_process
from qwantize_vllm.plugin.search_kernels import submit_searches
from qwantize_vllm.plugin.search_process import start_search_process
from tests.replay_launches import Driver

compilations: list[tuple[str, bool]] = []


def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
    compilations.append((src.name, cache_hit))


def launch_all(settings: QwantizeSettings, n: int, k: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        for job in submit_searches(settings, torch.empty(n, k, dtype=torch.bfloat16, device="meta"), pool):
            job.result()


if __name__ == "__main__":
    driver.set_active(Driver())
    knobs.compilation.listener = listen
    settings = QwantizeSettings(scale_search=sys.argv[1], block_size=int(sys.argv[2]))
    start = functools.partial(start_search_process, fork=sys.argv[3] == "fork")
    thread = start(settings, 90)
    assert thread is not None
    assert start(settings, 90) is None, "there is one in a process"
    thread.join()
    search_process._thread = None  # as in a later start
    assert start(settings, 90) is None, "all are compiled"
    for n, k in ((6144, 4096), (4096, 14336)):
        launch_all(settings, n, k)
    assert all(hit for _, hit in compilations), compilations
    for others in (QwantizeSettings(block_size=48 - settings.block_size), settings):
        search_process._thread = None
        started = start(others, 80 if others is settings else 90)
        assert started is not None, "those of other settings, or of another GPU, are not compiled"
        started.join()
    print(*sorted({name for name, _ in compilations}))
