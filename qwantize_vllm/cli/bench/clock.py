"""Seconds that a call takes, and the bandwidth of a copy: what a kernel could reach if its arithmetic were free."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

# A call is repeated for about this long.
REPEAT_SECONDS = 0.3
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
# Filled before every call on a GPU. It empties the L2 cache of the call's inputs, and it takes longer than
# Python needs to launch the call, so that the events time the GPU and not the launches.
_FLUSH_BYTES = 2**30


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call after a warm-up: by events on a GPU, by the wall clock on a CPU."""
    if device.type == "cuda":
        return _median_by_events(call, device)
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=REPEAT_SECONDS).median


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written each second by a copy of 1 GiB (on a CPU 256 MiB)."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def _median_by_events(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(2):
        call()  # compiles, and fills the allocator's cache
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    repeats = min(max(int(REPEAT_SECONDS / (time.perf_counter() - began)), 3), 100)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        flush.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1000
