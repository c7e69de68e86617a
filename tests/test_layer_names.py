from __future__ import annotations

import pytest

from qwantize_vllm.layer_names import check_pattern, fused_members, in_tower, matches, named_parts

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (QKV, True),
        ("qkv_proj", False),
        ("*qkv_proj", True),
        ("model.layers.?.self_attn.*", True),
        (r"re:model\.layers\.\d+\.self_attn", True),
        (r"re:self_attn", False),
        ("re:.*self_attn", True),
    ],
)
def test_patterns(pattern, expected):
    assert matches(QKV, [pattern]) is expected


def test_members_of_fused_layers():
    q, k, v = fused_members(QKV, PACKED)
    assert (q, v) == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    assert fused_members("o_proj", PACKED) == ["o_proj"]
    assert fused_members("qkv_proj", PACKED) == ["q_proj", "k_proj", "v_proj"]
    assert named_parts(QKV, [k], PACKED) == [k]
    assert named_parts(QKV, ["*.[qkv]_proj"], PACKED) == [q, k, v]
    assert named_parts(QKV, ["*qkv_proj"], PACKED) == [QKV]
    assert named_parts(QKV, ["*.o_proj"], PACKED) == []


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match="not a regular expression"):
        check_pattern("re:[")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("visual.blocks.0.attn.qkv", True),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", True),
        ("multi_modal_projector.linear_1", True),
        ("audio_tower.layers.3.fc2", True),
        ("vpm.encoder.layers.0.self_attn.qkv_proj", True),
        ("language_model.model.layers.0.self_attn.qkv_proj", False),
        ("model.layers.1.mlp.vision_expert.down_proj", False),  # of a language model that looks
        ("model.revisions.0.proj", False),
    ],
)
def test_towers_are_known_by_name(name, expected):
    assert in_tower(name) is expected
