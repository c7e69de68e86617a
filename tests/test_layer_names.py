from __future__ import annotations

import pytest

from qwantize_vllm.layer_names import check_pattern, fused_members, matches, named_parts

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
