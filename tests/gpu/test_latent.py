"""Latent attention where a prompt goes on behind what is in the cache: vLLM multiplies the cache by `kv_b_proj` then.

Run with vLLM's CUDA build: pytest -m gpu -s tests/gpu/test_latent.py
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.moe_checkpoints import DEEPSEEK, write_moe
from tests.e2e.probe import score
from tests.gpu.engine import NEEDS_VLLM, result_of

SEQUENCES = [list(range(start, start + 120)) for start in (3, 50, 100)]

pytestmark = [
    pytest.mark.gpu,
    NEEDS_VLLM,
]


def scores(llm: Any) -> list[list[float]]:
    return score(llm, SEQUENCES)


@pytest.mark.parametrize("backend", ["auto", "marlin"])
def test_a_prompt_in_chunks_is_scored_as_in_one(tmp_path: Path, backend: str) -> None:
    checkpoint, settings = write_moe(tmp_path / "checkpoint", DEEPSEEK), {"backend": backend}
    few = {"max_num_seqs": 4}
    whole = result_of(scores, tmp_path / "whole", checkpoint, settings, **few)
    chunks = result_of(scores, tmp_path / "chunks", checkpoint, settings, max_num_batched_tokens=32, **few)
    apart = [abs(a - b) for one, other in zip(whole, chunks, strict=True) for a, b in zip(one, other, strict=True)]
    median = statistics.median(apart)
    print(f"\n{backend}: {len(apart)} log-probabilities, apart by {median:.4f}, at most {max(apart):.4f}")
    assert median < 0.05
