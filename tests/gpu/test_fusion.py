"""Norms and gates in the kernels of products, in an engine: that they are, and that it is as exact as without.

Run with vLLM's CUDA build, on a GPU of Hopper: pytest -m gpu tests/gpu/test_fusion.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.checkpoints import quantize_checkpoint, write_dequantized, write_tiny
from tests.e2e.probe import generate
from tests.gpu.engine import NEEDS_VLLM, result_of
from tests.gpu.exact import Exact
from tests.matmul.test_wgmma import hopper

PROMPTS = [[1, 5, 9, 30], [7], list(range(3, 90))]
LAYERS = 3

pytestmark = [
    hopper,
    pytest.mark.gpu,
    NEEDS_VLLM,
]
launched: Counter[tuple[bool, bool]] = Counter()


def count_launches() -> None:
    """Of the kernel for few tokens: whether it normed x, whether it gated."""
    from qwantize_vllm.matmul import gluon_decode

    launch = gluon_decode.matmul_decode

    def counted(*arguments: Any, **options: Any) -> Any:
        launched[options.get("norm") is not None, options.get("gated", False)] += 1
        return launch(*arguments, **options)

    gluon_decode.matmul_decode = counted


def one_after_the_other(llm: Any) -> dict[str, Any]:
    while_captured = dict(launched)
    return {"completions": [generate(llm, [prompt], 12)[0] for prompt in PROMPTS], "launched": while_captured}


def test_an_engine_is_as_exact_with_norms_in_products(tmp_path: Path) -> None:
    """Sums of bfloat16 products are rounded elsewhere: both engines are held against float32."""
    checkpoint = write_tiny(tmp_path / "tiny", num_hidden_layers=LAYERS)
    watched = {"before": count_launches, "enforce_eager": False}
    fused, steps = (
        result_of(one_after_the_other, tmp_path / str(on), checkpoint, {"fuse_norms": on}, **watched)
        for on in (True, False)
    )
    # Each at least once: with a gate for one token and for two, without for one (tile_shapes.py). The first qkv follows
    # a norm without a sum.
    assert fused["launched"].get((True, True), 0) >= 2 * LAYERS
    assert fused["launched"].get((True, False), 0) >= LAYERS - 1
    assert not any(normed for normed, _ in steps["launched"])
    exact = Exact(write_dequantized(checkpoint, quantize_checkpoint(checkpoint), tmp_path / "exact", torch.float32))
    distances = [exact.distance(outcome["completions"]) for outcome in (fused, steps)]
    print(
        f"log-probabilities apart from float32 by {distances[0]:.4f} with norms in products, {distances[1]:.4f} without"
    )
    assert distances[0] < 1.25 * distances[1]
