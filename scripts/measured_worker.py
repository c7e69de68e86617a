"""A worker of vLLM that notes how long the parts of its start take, and what GPU memory loading the weights took.

LLM(..., worker_cls="measured_worker.MeasuredWorker").collective_rpc("figures")
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

_FIGURES: dict[str, Any] = {}  # of this process's worker


class MeasuredWorker(Worker):
    """What it notes, in seconds: load, of which quantize; profile (torch.compile is in it); warm_up (graphs are
    captured in it); on a GPU compiled, by the names of kernels of Triton's that this process compiled, added up over
    its threads. In bytes: weights; on a GPU peak_allocated and peak_reserved of PyTorch while they were loaded."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        _note_summaries()
        if torch.cuda.is_available():
            _note_compilations()
        BaseModelLoader.load_model = _with_peaks(BaseModelLoader.load_model)
        with _timed("load"):
            super().load_model(*args, **kwargs)
        _FIGURES["weights"] = _tensor_bytes(self.model_runner.get_model())

    def determine_available_memory(self) -> Any:
        with _timed("profile"):
            return super().determine_available_memory()

    def compile_or_warm_up_model(self) -> Any:
        with _timed("warm_up"):
            return super().compile_or_warm_up_model()

    def figures(self) -> dict[str, Any]:
        return copy.deepcopy(_FIGURES)


@contextlib.contextmanager
def _timed(part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    _FIGURES[part] = time.perf_counter() - began


def _with_peaks(load_model: Any) -> Any:
    """vLLM resets the peaks before its worker's load_model returns: they are read inside of it."""

    def load_model_with_peaks(*args: Any, **kwargs: Any) -> Any:
        if not torch.cuda.is_available():
            return load_model(*args, **kwargs)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        model = load_model(*args, **kwargs)
        _FIGURES["peak_allocated"] = torch.cuda.max_memory_allocated() - before["allocated"]
        _FIGURES["peak_reserved"] = torch.cuda.max_memory_reserved() - before["reserved"]
        return model

    return load_model_with_peaks


def _note_summaries() -> None:
    """The plugin's load report ends with the seconds that quantizing took."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.search(r"qwantize summary: .*; ([\d.]+) s$", record.getMessage()):
                _FIGURES["quantize"] = float(found[1])
                _FIGURES["summary"] = record.getMessage()

    logging.getLogger("vllm.qwantize_vllm.plugin.report").addHandler(Notes())


def _note_compilations() -> None:
    from triton import knobs

    compiled: dict[str, float] = {}
    _FIGURES["compiled"] = compiled

    def listen(*, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            compiled[src.name] = compiled.get(src.name, 0.0) + times.total / 1e6

    knobs.compilation.listener = listen


def _tensor_bytes(model: torch.nn.Module) -> int:
    storages: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if torch.is_tensor(tensor) and not tensor.is_meta:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
