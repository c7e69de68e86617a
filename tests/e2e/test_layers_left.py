"""Layers that stay as they are: named by `ignore`, or of a K that blocks do not divide."""

from __future__ import annotations

from typing import Any

import pytest

from .checkpoints import TINY_LAYERS, quantize_checkpoint, write_tiny
from .compare import assert_agree, served_layers
from .engine import Outcome

pytestmark = pytest.mark.e2e

LINEAR = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
ALL = {f"model.layers.{i}.{name}" for i in range(TINY_LAYERS) for name in LINEAR}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def overrides(**settings: Any) -> dict[str, Any]:
    return {"hf_overrides": {"quantization_config": {"quant_method": "qwantize", **settings}}}


def warnings(outcome: Outcome) -> list[str]:
    return [line.partition("] ")[2] for line in outcome.lines("qwantize:") if "WARNING" in line]


def left(outcome: Outcome) -> set[str]:
    return ALL - served_layers(outcome)


def test_exact_name_glob_and_regular_expression(engines, tiny):
    unused = ["no.such.layer", "*.o_prj"]
    patterns = ["model.layers.0.self_attn.o_proj", "*.1.mlp.down_proj", r"re:model\.layers\.0\.mlp\.", *unused]
    outcome = engines.start(tiny, **overrides(ignore=patterns))
    assert left(outcome) == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    }
    assert warnings(outcome) == [
        f"qwantize: ignore pattern '{pattern}' named no layer of this model" for pattern in unused
    ]
    (summary,) = outcome.lines("qwantize summary:")
    assert "summary: 4 layers quantized" in summary
    assert "4 ignored" in summary


def test_one_member_of_a_fused_layer_keeps_the_whole_layer(engines, tiny):
    outcome = engines.start(tiny, **overrides(ignore=[Q_PROJ]))
    assert left(outcome) == {"model.layers.0.self_attn.qkv_proj"}
    (warning,) = warnings(outcome)
    assert f"ignore names {Q_PROJ} but not every member of model.layers.0.self_attn.qkv_proj" in warning
    assert "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj" in warning
    assert "the whole layer is left unquantized" in warning


def test_one_member_of_a_fused_layer_is_an_error_where_strict(engines, tiny):
    log = engines.refuse(tiny, **overrides(ignore=[Q_PROJ], strict=True))
    assert f"ignore names {Q_PROJ} but not every member of model.layers.0.self_attn.qkv_proj" in log
    assert "name all of them, or 'model.layers.0.self_attn.qkv_proj' (strict: true)" in log


def test_all_members_of_a_fused_layer_are_the_layer(engines, tiny):
    outcome = engines.start(tiny, **overrides(ignore=["*.q_proj", "*.k_proj", "*.v_proj"], strict=True))
    assert left(outcome) == {"model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"}
    assert warnings(outcome) == []


def test_naming_the_head_is_no_mistake(engines, tiny):
    """It is left anyway, and lists of layers to ignore usually name it."""
    outcome = engines.start(tiny, **overrides(ignore=["lm_head"]))
    assert left(outcome) == set()
    assert warnings(outcome) == []


def test_k_not_a_multiple_of_the_block(engines, tmp_path):
    checkpoint = write_tiny(tmp_path / "checkpoint", intermediate_size=248)
    outcome = engines.start(checkpoint)
    odd = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert left(outcome) == set(odd)
    assert warnings(outcome) == [
        f"qwantize: {name} is left unquantized: K=248 is not a multiple of block_size 16" for name in odd
    ]
    quantized = quantize_checkpoint(checkpoint, skip=odd)
    assert_agree(outcome, engines.start_dequantized(checkpoint, quantized, outcome), 0.05)


def test_k_not_a_multiple_of_the_block_is_an_error_where_strict(engines, tmp_path):
    checkpoint = write_tiny(tmp_path / "checkpoint", intermediate_size=248)
    log = engines.refuse(checkpoint, **overrides(strict=True))
    layer = "model.layers.0.mlp.down_proj"
    assert f"qwantize: {layer} cannot be quantized: K=248 is not a multiple of block_size 16 (strict: true)" in log
    assert "Loading safetensors" not in log
