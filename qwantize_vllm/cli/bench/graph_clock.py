"""Seconds of a call inside a CUDA graph, as a served model makes it: not launched by Python, its weight not cached.

One graph makes the call with one copy of the weight after the other. Together the copies exceed the L2 cache several
times, so that a copy has left it when its turn comes again.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from qwantize_vllm.cli.bench.clock import median_seconds

T = TypeVar("T")
# The copies of a weight together are at least so many times as large as the L2 cache.
CACHE_TIMES = 4
# A weight so small that even these do not exceed the cache is timed within it.
MAX_COPIES = 256
# Calls in a graph, so that its own launch hardly counts; fewer where they take longer than this.
_CALLS = 64
_GRAPH_SECONDS = 0.05
_REPEAT_SECONDS = 0.1
# A GPU at its power limit lowers its clock, in some tenths of a second: a call is timed once it is its own power that
# counts, not that of what was timed before, or of nothing. (An H200 multiplies 4096 x 4096 by 4,096 tokens of random
# numbers in 175 us for the first hundredth of a second, and in 198 from then on.)
_SETTLE_SECONDS = 0.3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a call, and how they were measured: "graph", "events" (launch included) or "wall clock".

    no_graph: why a GPU was not timed by a graph.
    """

    seconds: float
    method: str
    no_graph: str | None = None


class Timed(Protocol):
    """A cell of a table, a frozen dataclass; its fields are those of `Timing`, in microseconds, with an error against
    float64 and what was raised."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def us(self) -> float | None: ...

    @property
    def method(self) -> str | None: ...

    @property
    def error(self) -> float | None: ...

    @property
    def problem(self) -> str | None: ...


CellT = TypeVar("CellT", bound=Timed)


def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; 0 for a CPU, whose caches are not emptied."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copies_beyond_cache(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight a graph needs: at least 2, at most MAX_COPIES; on a CPU one is enough."""
    if device.type != "cuda":
        return 1
    return min(max(2, math.ceil(CACHE_TIMES * cache_bytes(device) / weight_bytes)), MAX_COPIES)


def time_call(calls: Sequence[Callable[[], object]], device: torch.device) -> Timing:
    """The same call with each copy of the weight, timed by a graph, by events where it cannot be captured.

    On a CPU the first of them is timed, by the wall clock.
    """
    if device.type != "cuda":
        return Timing(median_seconds(calls[0], device), "wall clock")
    try:
        return Timing(_graph_seconds(calls, device), "graph")
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of the capture: what the calls themselves raise, they raised when they were checked
        torch.cuda.synchronize(device)
        _settle(calls[0], device)
        return Timing(median_seconds(calls[0], device), "events", str(error).splitlines()[0])


def there_and_back(measurements: Sequence[Callable[[], T]]) -> list[tuple[T, T]]:
    """What each finds, in their order, and once more in the reverse.

    A GPU gets warmer, and then slower, for longer than one call is waited for: who comes later would be at a
    disadvantage. The mean of both is the same for all as long as it is a steady drift.
    """
    there = [measure() for measure in measurements]
    back = [measure() for measure in reversed(measurements)]
    return list(zip(there, reversed(back), strict=True))


def mean_cell(first: CellT, second: CellT) -> CellT:
    """One cell of what was found there and back: the mean time, the larger error, and a graph only if it was one twice.
    What failed once has failed."""
    if first.us is None or second.us is None:
        return second if second.problem else first
    error = None if first.error is None or second.error is None else max(first.error, second.error)
    timed = first if second.method == "graph" else second
    return dataclasses.replace(timed, us=(first.us + second.us) / 2, error=error)


def mean_there_and_back(measurements: Sequence[Callable[[], float | None]]) -> list[float | None]:
    """The means of what `there_and_back` finds; None where one has none."""
    return [None if a is None or b is None else (a + b) / 2 for a, b in there_and_back(measurements)]


def _graph_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median seconds of a call over replays of one graph."""

    def make_all_calls() -> None:
        for call in calls:
            call()

    make_all_calls()  # compiles; nothing may be compiled during a capture
    once = _milliseconds(make_all_calls, device) / 1000
    rounds = max(1, min(math.ceil(_CALLS / len(calls)), int(_GRAPH_SECONDS / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            make_all_calls()
    graph.replay()
    first = _settle(graph.replay, device)
    replays = min(max(int(_REPEAT_SECONDS / first), 3), 100)
    milliseconds = statistics.median(_milliseconds(graph.replay, device) for _ in range(replays))
    return milliseconds / 1000 / (rounds * len(calls))


def _settle(call: Callable[[], object], device: torch.device) -> float:
    """Make the call until the GPU's clock is what it is under it; returns the seconds that the first one took."""
    first = _milliseconds(call, device) / 1000
    for _ in range(int(_SETTLE_SECONDS / first)):
        _milliseconds(call, device)
    return first


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop)
