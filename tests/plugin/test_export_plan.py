"""What of a checkpoint an export quantizes, and under which names it writes experts that lie stacked."""

from __future__ import annotations

import types

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint
from qwantize_vllm.checkpoint.export import ExportLayer
from qwantize_vllm.checkpoint.members import Member, Part
from qwantize_vllm.plugin import unstacked
from qwantize_vllm.plugin.export_plan import Plan, _ignore, _in_order, _Weight, _why_left
from qwantize_vllm.plugin.noted_loads import Load
from qwantize_vllm.plugin.unstacked import Unstacked, unstacked_name, why_not_unstacked, written

LAYER = types.SimpleNamespace(
    ckpt_gate_proj_name="gate_proj", ckpt_up_proj_name="up_proj", ckpt_down_proj_name="down_proj"
)
NAME = "language_model.model.layers.3.mlp.experts"  # by which vLLM knows the layer
LAYER.quant_method = types.SimpleNamespace(name=NAME)
LAYOUT, SHARDS = LAYOUTS["compressed-tensors"], ("w1", "w3")


@pytest.mark.parametrize(
    ("tensor", "shard", "name"),
    [
        (
            "model.language_model.layers.3.mlp.experts.gate_up_proj",
            "w1",
            "model.language_model.layers.3.mlp.experts.17",
        ),
        ("model.layers.3.mlp.experts.fc2.weight", "w2", "model.layers.3.mlp.experts.17"),
        ("model.layers.3.block_sparse_moe.input_linear.weight", "w3", f"{NAME}.17"),
    ],
)
def test_names_of_unstacked_experts(tensor, shard, name):
    projection = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[shard]
    load = Load(tensor, Part(17, 0, 32, False), shard, 17)
    assert unstacked_name(LAYER, NAME, load) == f"{name}.{projection}"


@pytest.fixture
def source(tmp_path):
    tensors = {"experts.gate_up_proj": torch.zeros(2, 64, 32), "norm.weight": torch.zeros(64)}
    tensors |= {"qkv.weight": torch.zeros(96, 64), "z.weight": torch.zeros(32, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


def weight_of(loads, shape):
    return _Weight(f"{NAME}.0.w13", LAYER, "path", "w13", shape, _in_order(loads), lambda weight: [])


def loads_of(expert):
    """Gate and up of a slice of experts.gate_up_proj (2, K=64, N=32), which vLLM transposes."""
    return [
        Load("experts.gate_up_proj", Part(expert, 16 * i, 16, True), shard, expert) for i, shard in enumerate(SHARDS)
    ]


def test_stacked_experts_are_exported_where_all_of_them_are_loaded(source):
    both = [weight_of(loads_of(expert)[::-1], (32, 64)) for expert in range(2)]
    assert _why_left(both, source, set(), None) is None
    assert [member.name.rpartition(".")[2] for member in both[1].members] == ["gate_proj", "up_proj"]
    assert [each.shard for each in both[1].unstacked] == ["w1", "w3"]
    assert _why_left(both, source, set(), "a reason") == "a reason"
    as_it_lies = "vLLM does not load its weights as they lie in the checkpoint"
    assert _why_left(both[:1], source, set(), None) == as_it_lies  # nobody loads the second expert
    assert _why_left([both[0], both[0]], source, set(), None) == as_it_lies
    assert "another layer's too" in _why_left(both, source, {"experts.gate_up_proj"}, None)
    wrong = [weight_of([Load("experts.gate_up_proj", Part(0, 0, 32, True), "w1", 0)], (64, 64))]
    assert _why_left(wrong, source, set(), None) == as_it_lies


def test_a_part_of_a_stacked_tensor_is_no_linear_layer(source):
    loads = [Load("experts.gate_up_proj", Part(0, 0, 32, True), None, None)]
    assert "as they lie" in _why_left([weight_of(loads, (32, 64))], source, set(), None)


def test_a_tensor_that_is_several_parts_keeps_its_layer(source):
    """As in_proj_qkv of Qwen3.5, beside in_proj_z: a loader of NVFP4 wants a scale for each part."""
    loads = [Load("z.weight", None, 3, None), Load("qkv.weight", None, (0, 1, 2), None)]
    weight = weight_of(loads, (128, 64))
    assert [member.name for member in weight.members] == ["qkv", "z"]
    assert "is several parts" in _why_left([weight], source, set(), None)


def test_stacked_experts_of_a_draft_model_are_ignored_one_by_one(tmp_path):
    """As in mtp.layers of Qwen3.5: the model has no such layer, but a draft model may be served with the export."""
    at = {layer: f"{layer}.mlp.experts" for layer in ("model.layers.0", "mtp.layers.0")}
    tensors = {f"{each}.gate_up_proj": torch.zeros(2, 64, 32) for each in at.values()}
    tensors |= {f"{each}.down_proj": torch.zeros(2, 32, 32) for each in at.values()}
    save_file({**tensors, "conv1d.weight": torch.zeros(8, 1, 4)}, tmp_path / "model.safetensors")
    members = tuple(
        Member(f"{at['model.layers.0']}.{expert}.{name}", f"{at['model.layers.0']}.{name}", Part(expert, 0, 32, False))
        for expert in range(2)
        for name in ("gate_up_proj", "down_proj")
    )
    plan = Plan([ExportLayer("all", members)], {}, [], {}, [], [])
    projections = [f"{expert}.{name}_proj" for expert in range(2) for name in ("gate", "up", "down")]
    ignored = _ignore(plan, types.SimpleNamespace(experts={}), Checkpoint(tmp_path))
    assert ignored == ["lm_head", *(f"{at['mtp.layers.0']}.{each}" for each in projections)]


@pytest.fixture
def trial(source, monkeypatch):
    """arrives(name) -> Load or None, what vLLM makes of each tensor of the export; returns why not."""
    members = [
        Member(f"experts.0.{name}_proj", "experts.gate_up_proj", Part(0, 0, 16, True)) for name in ("gate", "up")
    ]
    layers = [ExportLayer("w13", tuple(members))]
    names = [Unstacked(m.name, "path", "w13", shard, 0) for m, shard in zip(members, SHARDS, strict=True)]
    settings = types.SimpleNamespace(block_size=16)
    built = types.SimpleNamespace(quantization=types.SimpleNamespace(settings=settings), exported=lambda config: config)

    def run(arrives):
        def noted(built, tensors):
            found = {}
            for name, _, _ in tensors:
                key = "path", f"w13_{name.rpartition('.')[2]}"
                found.setdefault(key, []).append(arrives(name))
            return {key: [load for load in loads if load is not None] for key, loads in found.items()}

        monkeypatch.setattr(unstacked, "noted_loads", noted)
        return why_not_unstacked(built, source, layers, names, LAYOUT, {})

    return run


def loaded(name):
    return Load(name, None, "w1" if "gate" in name else "w3", 0) if ".experts." in f".{name}" else None


def test_names_that_vllm_loads_are_taken(trial):
    assert trial(loaded) is None


@pytest.mark.parametrize("which", ["experts.0.up_proj.weight_scale", "experts.0.gate_proj.weight_global_scale"])
def test_a_tensor_that_would_not_arrive_is_named(trial, which):
    assert trial(lambda name: None if name == which else loaded(name)) == (
        f"vLLM does not load its experts one by one: {which} would not arrive"
    )


def test_a_tensor_that_would_arrive_elsewhere_is_named(trial):
    said = trial(lambda name: Load(name, None, "w1", 0) if "experts.0" in name else None)
    assert "experts.0.up_proj.weight_global_scale would not arrive" in said


def test_what_vllm_raises_is_the_reason(trial):
    def raises(name):
        raise KeyError(name)

    assert trial(raises) == "vLLM does not load its experts one by one: KeyError: 'norm.weight'"


def test_what_an_export_has(source):
    layers = [ExportLayer("w13", (Member("experts.0.gate_proj", "experts.gate_up_proj", Part(0, 0, 16, True)),))]
    assert [(name, shape) for name, _, shape in written(source, layers, LAYOUT, 16) if "experts" in name] == [
        ("experts.0.gate_proj.weight_packed", (16, 32)),
        ("experts.0.gate_proj.weight_scale", (16, 4)),
        ("experts.0.gate_proj.weight_global_scale", (1,)),
    ]
    copied = {name for name, _, _ in written(source, layers, LAYOUT, 16) if "experts" not in name}
    assert copied == {"norm.weight", "qkv.weight", "z.weight"}
