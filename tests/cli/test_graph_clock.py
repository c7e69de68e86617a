"""The timing by CUDA graphs, on a GPU made of paper: its clock moves by what is run on it."""

from __future__ import annotations

import contextlib
import itertools
import math
import types

import pytest
import torch

from qwantize_vllm.cli.bench import graph_clock
from qwantize_vllm.cli.bench.graph_clock import (
    Timing,
    copies_beyond_cache,
    mean_there_and_back,
    there_and_back,
    time_call,
)

CUDA = torch.device("cuda")
LAUNCH_OF_A_GRAPH = 0.5


@pytest.fixture
def gpu(monkeypatch):
    """In place of torch.cuda: `call(copy, milliseconds)` gives a call, `ran` says which copies were run or captured;
    from `hot_at` on everything takes a quarter longer."""
    gpu = types.SimpleNamespace(now=0.0, hot_at=math.inf, capture=None, ran=[], captured=[], cannot_capture=None)

    def spend(milliseconds):
        gpu.now += milliseconds if gpu.now < gpu.hot_at else 1.25 * milliseconds

    def call(copy, milliseconds):
        def run():
            if gpu.capture is None:
                spend(milliseconds)
                gpu.ran.append(copy)
                return
            if gpu.cannot_capture:
                raise gpu.cannot_capture
            gpu.capture.milliseconds += milliseconds
            gpu.captured.append(copy)

        return run

    class Graph:
        milliseconds = LAUNCH_OF_A_GRAPH

        def replay(self):
            spend(self.milliseconds)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def elapsed_time(self, other):
            return other.at - self.at

    @contextlib.contextmanager
    def capture(graph):
        gpu.capture = graph
        try:
            yield
        finally:
            gpu.capture = None

    parts = {"CUDAGraph": Graph, "Event": Event, "graph": capture, "synchronize": lambda device: None}
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=50 * 2**20)
    )
    gpu.call = call
    return gpu


def test_all_copies_take_turns_in_one_graph_until_its_launch_hardly_counts(gpu):
    timing = time_call([gpu.call(copy, 0.1) for copy in range(6)], CUDA)
    assert timing.method == "graph"
    assert gpu.captured == list(range(6)) * 11  # 64 calls, in whole rounds
    assert gpu.ran == list(range(6)) * 2  # before the capture, so that everything is compiled
    assert timing.seconds == pytest.approx(1e-4 + LAUNCH_OF_A_GRAPH / 66000)


def test_a_call_is_timed_once_the_gpu_is_as_hot_as_it_gets(gpu):
    gpu.hot_at = 250
    timing = time_call([gpu.call(copy, 0.1) for copy in range(6)], CUDA)
    assert timing.seconds == pytest.approx(1.25 * (1e-4 + LAUNCH_OF_A_GRAPH / 66000))


def test_a_steady_drift_is_the_same_for_all():
    now = itertools.count()
    found = there_and_back([lambda name=name: (name, next(now)) for name in "abc"])
    assert found == [(("a", 0), ("a", 5)), (("b", 1), ("b", 4)), (("c", 2), ("c", 3))]


def test_the_mean_of_both_is_none_where_one_is():
    once = iter([1.0, None])
    assert mean_there_and_back([lambda: 2.0, lambda: next(once)]) == [2.0, None]


def test_long_calls_are_captured_fewer_times(gpu):
    assert time_call([gpu.call(copy, 20) for copy in range(2)], CUDA).seconds == pytest.approx(0.02, rel=0.02)
    assert gpu.captured == [0, 1]


def test_what_cannot_be_captured_is_timed_by_events(gpu, monkeypatch):
    gpu.cannot_capture = RuntimeError("operation not permitted when stream is capturing\nlong story")
    monkeypatch.setattr(graph_clock, "median_seconds", lambda call, device: 0.125 if gpu.now > 250 else 0.1)
    timing = time_call([gpu.call(0, 1)], CUDA)
    assert timing == Timing(0.125, "events", "operation not permitted when stream is capturing")


def test_a_gpu_without_memory_is_not_taken_for_one_without_graphs(gpu):
    gpu.cannot_capture = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        time_call([gpu.call(0, 1)], CUDA)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("weight_bytes", "copies"), [(4096 * 4096 * 9 // 16, 23), (4096 * 4096 * 2, 7), (2**30, 2), (100, 256)]
)
def test_the_copies_exceed_the_cache_four_times(weight_bytes, copies):
    assert copies_beyond_cache(weight_bytes, CUDA) == copies


def test_on_a_cpu_one_copy_is_timed_by_the_wall_clock(monkeypatch):
    monkeypatch.setattr(graph_clock, "median_seconds", lambda call, device: call())
    cpu = torch.device("cpu")
    assert copies_beyond_cache(100, cpu) == 1
    assert time_call([lambda: 0.5], cpu) == Timing(0.5, "wall clock")


@pytest.mark.gpu
def test_a_matmul_on_a_gpu_is_captured():
    x, weights = torch.randn(16, 256, device=CUDA), [torch.randn(256, 256, device=CUDA) for _ in range(3)]
    timing = time_call([lambda w=w: x @ w for w in weights], CUDA)
    assert timing.method == "graph"
    assert timing.seconds > 0
