"""A draft layer that comes with the model is quantized as the model is, in engines with CUDA graphs.

Run with vLLM's CUDA build: pytest -m gpu -s tests/gpu/test_multi_token.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.moe_checkpoints import write_glm
from tests.e2e.probe import generate, metrics_of
from tests.gpu.engine import NEEDS_VLLM, start

PROMPTS = [[1, 5, 9, 30], [7], list(range(3, 90))]
TOKENS = 24
# Rounding to bfloat16 decides between tokens, and experts, that are nearly even: on a CPU scores may be off by 0.13.
NEARLY_EVEN = 0.5

pytestmark = [
    pytest.mark.gpu,
    NEEDS_VLLM,
]


def completions(llm: Any) -> dict[str, Any]:
    answers = generate(llm, PROMPTS, TOKENS)
    return {"answers": answers, "drafts": metrics_of(llm).get("vllm:spec_decode_num_drafts")}


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float | None:
    """How much less likely than the best our first token is that is not theirs, by their own probabilities."""
    for a, b, scores in zip(ours["ids"], theirs["ids"], theirs["logprobs"], strict=True):
        if a != b:
            return max(scores.values()) - scores.get(a, float("-inf"))
    return None


def test_answers_with_a_draft_layer_are_those_without(tmp_path: Path) -> None:
    checkpoint = write_glm(tmp_path / "glm")
    plain = start(completions, tmp_path / "plain", checkpoint, {}, disable_log_stats=False)
    config = {"method": "mtp", "num_speculative_tokens": 2}
    ours = start(completions, tmp_path / "mtp", checkpoint, {}, disable_log_stats=False, speculative_config=config)
    of_model, of_draft = ours.lines("qwantize summary:")
    assert "9 layers quantized" in of_model
    assert "5 layers quantized" in of_draft
    assert ours.result["drafts"] > 0
    pairs = zip(ours.result["answers"], plain.result["answers"], strict=True)
    differences = [difference for pair in pairs if (difference := first_difference(*pair)) is not None]
    print(f"{len(differences)} of {len(PROMPTS)} answers differ, first tokens less likely by {differences}")
    assert all(difference < NEARLY_EVEN for difference in differences)
