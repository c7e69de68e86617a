"""Dtypes, biases, tied embeddings and settings of the search, on tiny models.

Each is compared with plain vLLM on the checkpoint that its codes and scales stand for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .checkpoints import QWEN2, linear_layers, quantize_checkpoint, write_tiny
from .compare import assert_agree, assert_serves, served_layers, tensors_of

pytestmark = pytest.mark.e2e

# How far a log-probability may be off, by the number of bits that a matmul's result is rounded to, and the weights of
# the dense layers that are compared with: the kernel that multiplies from codes does not round its own.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.03, "float32": 1e-4}


@dataclasses.dataclass(frozen=True)
class Case:
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    search: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "as it comes": Case(),
    "block_size 32": Case(search={"block_size": 32}),
    "naive": Case(search={"scale_search": "naive"}),
    "global_scale none": Case(search={"global_scale": "none"}),
    "float16": Case(dtype="float16"),
    "float32": Case(dtype="float32"),
    "bias": Case(config=QWEN2),
    "tied embeddings": Case(config={"tie_word_embeddings": True}),
}


SLOWER = ("naive", "global_scale none")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOWER else name for name in CASES]
)
def test_model_is_that_of_its_dequantized_checkpoint(engines, tmp_path, name):
    case = CASES[name]
    dtype = getattr(torch, case.dtype)
    checkpoint = write_tiny(tmp_path / "checkpoint", **case.config)
    expected = quantize_checkpoint(checkpoint, dtype, **case.search)
    overrides = {"quantization_config": {"quant_method": "qwantize", **case.search}}
    ours = engines.start(checkpoint, dtype=case.dtype, hf_overrides=overrides)

    assert served_layers(ours) == set(expected)
    for layer, q in expected.items():
        assert_serves(tensors_of(ours), layer, q)

    theirs = engines.start_dequantized(checkpoint, expected, ours, dtype=case.dtype)
    assert_agree(ours, theirs, TOLERANCE[case.dtype])


def test_the_transformers_backend(engines, tiny):
    """What vLLM takes for models that it has no class for."""
    expected = quantize_checkpoint(tiny, torch.float32)
    ours = engines.start(tiny, dtype="float32", model_impl="transformers")
    served = {f"model.{layer.removeprefix('model.')}": layer for layer in served_layers(ours)}
    assert set(served) == set(expected)
    for layer, q in expected.items():
        assert_serves(tensors_of(ours), served[layer], q)


def test_a_global_scale_for_each_member(engines, tmp_path):
    """Fused layers hold their members one below the other, each quantized as if it stood alone."""
    checkpoint = write_tiny(tmp_path / "checkpoint", **QWEN2)
    expected = quantize_checkpoint(checkpoint, fuse=False)
    overrides = {"quantization_config": {"quant_method": "qwantize", "global_scale": "amax_per_member"}}
    ours = engines.start(checkpoint, hf_overrides=overrides)

    for layer, members in linear_layers(load_file(checkpoint / "model.safetensors")).items():
        held = {name: tensors_of(ours)[f"{layer}.{name}"] for name in ("weight", "weight_scale", "weight_global_scale")}
        parts = [expected[member] for member in members]
        scales = torch.cat([q.block_scales.view(torch.uint8) for q in parts])
        assert torch.equal(held["weight"], torch.cat([q.codes for q in parts]))
        assert torch.equal(held["weight_scale"].view(torch.uint8), scales)
        assert torch.equal(held["weight_global_scale"].reshape(-1), torch.stack([q.global_scale for q in parts]))
    theirs = engines.start_dequantized(checkpoint, expected, ours)
    assert_agree(ours, theirs, TOLERANCE["bfloat16"])
