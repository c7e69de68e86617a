"""VLLM_BATCH_INVARIANT=1 on a GPU: what a prompt gets does not depend on those beside it, to the last bit.

Run with vLLM's CUDA build: pytest -m gpu -n 2 tests/gpu/test_batch_invariant.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.checkpoints import write_tiny
from tests.e2e.moe_checkpoints import QWEN3, write_moe
from tests.e2e.probe import generate
from tests.gpu.engine import NEEDS_VLLM, result_of

PROMPTS = [[1, 5, 9, 30], [7], list(range(3, 90)), list(range(40, 80)), [2, 2]]

pytestmark = [
    pytest.mark.gpu,
    NEEDS_VLLM,
]


def alone_and_together(llm: Any) -> dict[str, list[dict[str, Any]]]:
    alone = [generate(llm, [prompt], 16)[0] for prompt in PROMPTS]
    return {"alone": alone, "together": generate(llm, PROMPTS, 16)}


def write_dense(path: Path) -> Path:
    return write_tiny(path, hidden_size=2048, intermediate_size=4096, num_attention_heads=16, head_dim=128)


def write_experts(path: Path) -> Path:
    return write_moe(path, {**QWEN3, "hidden_size": 1024, "moe_intermediate_size": 2048})


@pytest.mark.parametrize("write", [write_dense, write_experts])
def test_a_prompt_gets_the_same_alone_and_beside_others(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """In sizes for which the usual kernels cut K, by the number of tokens."""
    checkpoint = write(tmp_path / "checkpoint")
    arguments = {"enforce_eager": False, "max_num_seqs": 8, "enable_prefix_caching": False}
    env = {"VLLM_BATCH_INVARIANT": "1"}
    result = result_of(alone_and_together, tmp_path / "engine", checkpoint, {}, env=env, **arguments)
    assert result["alone"] == result["together"]
