"""What quantizes layers on a GPU is compiled beside the start of an engine: here one on a CPU, told that it is not."""

from __future__ import annotations

import functools
import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from .engine import run_engine
from .probe import generate

pytestmark = pytest.mark.e2e


def pretend(method: str) -> None:
    """That vLLM runs on a Hopper, and starts its processes so, which on a CPU it always spawns."""
    from qwantize_vllm.plugin import config

    gpu = SimpleNamespace(to_int=lambda: 90)
    config.current_platform = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: gpu)
    config.get_mp_context = functools.partial(multiprocessing.get_context, method)


def answer(llm: Any) -> list[int]:
    from qwantize_vllm.plugin import search_process

    assert search_process._thread is not None
    search_process._thread.join()
    return generate(llm, [[1, 5, 9]], 4)[0]["ids"]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_an_engine_starts_and_kernels_are_compiled_beside_it(tiny, tmp_path, method):
    cache = tmp_path / "cache"
    outcome = run_engine(
        answer,
        tmp_path / "engine",
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TRITON_CACHE_DIR": str(cache)},
        before=functools.partial(pretend, method),
        model=str(tiny),
        quantization="qwantize",
        skip_tokenizer_init=True,
    )
    assert outcome.exit_code == 0, outcome.log[-3000:]
    assert len(outcome.result) == 4
    assert outcome.survivors == []
    assert list(cache.rglob("_search_sse_kernel.cubin"))
    assert list(cache.rglob("qwantize-compiled"))
    assert outcome.lines("will be compiled while they are loaded") == []
