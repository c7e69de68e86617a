"""Every backend of a GPU serves the same weights: as exactly as ours, and with answers as likely.

Run with vLLM's CUDA build: pytest -m gpu -s tests/gpu/test_backends.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.checkpoints import quantize_checkpoint, write_dequantized, write_tiny
from tests.e2e.probe import generate
from tests.gpu.engine import NEEDS_VLLM, result_of
from tests.gpu.exact import Exact

PROMPTS = [[1, 5, 9, 30], [7], list(range(3, 90))]

pytestmark = [
    pytest.mark.gpu,
    NEEDS_VLLM,
]


def completions(llm: Any) -> list[dict[str, Any]]:
    return generate(llm, PROMPTS, 16)


def test_backends_answer_alike(tmp_path: Path) -> None:
    """Greedy answers differ where two tokens are almost as likely: a chosen one may be less likely than the best by
    what two log-probabilities are off, of which the largest of some fifty is met."""
    checkpoint = write_tiny(tmp_path / "tiny", num_hidden_layers=3)
    answers = {
        backend: result_of(completions, tmp_path / backend, checkpoint, {"backend": backend})
        for backend in ("auto", "marlin", "humming")
    }
    exact = Exact(write_dequantized(checkpoint, quantize_checkpoint(checkpoint), tmp_path / "exact", torch.float32))
    distances = {backend: exact.distance(each) for backend, each in answers.items()}
    shortfalls = {backend: exact.shortfall(each) for backend, each in answers.items()}
    ids = {backend: [one["ids"] for one in each] for backend, each in answers.items()}
    same = {backend: sum(a == b for a, b in zip(each, ids["auto"], strict=True)) for backend, each in ids.items()}
    for backend, distance in distances.items():
        print(
            f"{backend}: apart from float32 by {distance:.4f}, chosen tokens less likely by at most "
            f"{shortfalls[backend]:.4f}, {same[backend]} of {len(PROMPTS)} answers those of auto"
        )
    for backend, distance in distances.items():
        assert distances["auto"] < 1.25 * distance
        assert shortfalls[backend] < 6 * distance
