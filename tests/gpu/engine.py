"""Engines of the plugin on a GPU, beside which other tests may use it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import Outcome, run_engine

# Tests of kernels run on GPU machines that have no vLLM.
NEEDS_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
# With the size of the KV cache given, vLLM does not ask how much memory is left.
_LITTLE_MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28}


def start(
    use: Callable[[Any], Any], directory: Path, checkpoint: Path, settings: dict[str, Any], **more: Any
) -> Outcome:
    """An engine with these settings of qwantize, once it has ended; more: arguments of `run_engine`, of which
    `quantization=None` is plain vLLM."""
    arguments = {"quantization": "qwantize", "additional_config": {"qwantize": settings}, **_LITTLE_MEMORY, **more}
    outcome = run_engine(use, directory, model=str(checkpoint), skip_tokenizer_init=True, **arguments)
    assert outcome.exit_code == 0, outcome.log[-5000:]
    return outcome


def result_of(*args: Any, **more: Any) -> Any:
    """What `use` returned; arguments as `start`."""
    return start(*args, **more).result
