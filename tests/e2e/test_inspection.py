"""What `qwantize inspect` measures, on a tiny checkpoint in two shards: that of the tensors an engine would hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qwantize_vllm.cli import app
from qwantize_vllm.cli.inspect import command
from qwantize_vllm.hessian import HessianInfo, save_hessians
from qwantize_vllm.search.quality import output_signal_and_noise, signal_and_noise

from .architectures import write_blip2
from .checkpoints import QWEN2, linear_layers, quantize_checkpoint, random_hessians, write_tiny
from .moe_checkpoints import EXPERTS, QWEN3, mixture_layers, write_moe

pytestmark = pytest.mark.e2e

NAIVE, OPTIMAL = {"scale_search": "naive"}, {"scale_search": "optimal"}
LAYER = "model.layers.1.self_attn.qkv_proj"
WITHOUT_HESSIAN = "model.layers.0.mlp.down_proj"


def inspect_each(cases: list[tuple[Any, ...]]) -> list[Any]:
    """In a process that imports vLLM once: what inspecting each of the cases gives, or the error that it raises."""
    from qwantize_vllm.plugin.inspection import _inspect

    results: list[Any] = []
    for case in cases:
        try:
            results.append(_inspect(*case, "auto"))
        except ValueError as error:
            results.append(error)
    return results


def in_shards(checkpoint: Path) -> Path:
    """Rewrite a checkpoint as two files and an index, with a layer's members in different ones."""
    whole = checkpoint / "model.safetensors"
    tensors = load_file(whole)
    shards: dict[str, dict[str, torch.Tensor]] = {"one.safetensors": {}, "two.safetensors": {}}
    for i, name in enumerate(sorted(tensors)):
        shards[list(shards)[i % 2]][name] = tensors[name]
    for file, part in shards.items():
        save_file(part, checkpoint / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    return checkpoint


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Inspections, or errors, by what was inspected; and the checkpoint with its Hessians."""
    from qwantize_vllm.plugin.engine_process import in_own_process

    folder = tmp_path_factory.mktemp("inspect")
    whole = write_tiny(folder / "whole", **QWEN2)
    sharded = in_shards(Path(shutil.copytree(whole, folder / "sharded")))
    hessians = random_hessians(whole)
    file, foreign = folder / "h.safetensors", folder / "foreign.safetensors"
    save_hessians(file, {name: h for name, h in hessians.items() if name != WITHOUT_HESSIAN}, 16)
    save_hessians(foreign, hessians, 16, HessianInfo(block_size=16, model="other", fingerprint="other"))
    lacking = Path(shutil.copytree(whole, folder / "lacking"))
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    hessian = {"scale_search": "hessian", "hessian": str(file)}
    ignoring = {"ignore": ["*.o_proj", "nothing"], "block_size": 32}
    settings = {"naive": NAIVE, "optimal": OPTIMAL, "hessian": hessian, "ignoring": ignoring}
    cases = {
        "sharded": (str(sharded), settings, file),
        "foreign": (str(whole), {"optimal": OPTIMAL}, foreign),
        "lacking": (str(lacking), {"optimal": OPTIMAL}, None),
        "strict": (str(whole), {"strict": {**hessian, "strict": True}}, None),
    }
    mixture = write_moe(folder / "mixture", QWEN3)
    experts = expert_hessians(mixture)
    save_hessians(folder / "experts.safetensors", experts, 16)
    cases["mixture"] = (str(mixture), {"naive": NAIVE}, folder / "experts.safetensors")
    towers = {"leave": OPTIMAL, "quantize": {**OPTIMAL, "towers": "quantize"}}
    blip2 = write_blip2(folder / "blip2")
    cases["towers"] = (str(blip2), towers, None)
    cases["towers left"] = (str(blip2), {"leave": OPTIMAL}, None)
    results = in_own_process(inspect_each, list(cases.values()))
    given = {"whole": whole, "hessians": hessians, "mixture checkpoint": mixture, "expert hessians": experts}
    return dict(zip(cases, results, strict=True)) | given


def expert_hessians(checkpoint: Path) -> dict[str, torch.Tensor]:
    """By the names that `calibrate` gives experts, of random inputs."""
    renamed = {}
    for name, hessian in random_hessians(checkpoint).items():
        layer, _, last = name.rpartition(".")
        if ".experts." in name:
            renamed[f"{layer}.{'w2' if last == 'down_proj' else 'w13'}"] = hessian
    return renamed


@pytest.mark.parametrize("setting", ["naive", "optimal", "hessian"])
def test_errors_are_those_of_what_an_engine_would_hold(found, setting):
    whole, hessians = found["whole"], found["hessians"]
    needed = hessians if setting == "hessian" else None
    expected = quantize_checkpoint(whole, hessians=needed, scale_search=setting)
    expected_optimal = quantize_checkpoint(whole, scale_search="optimal")
    tensors = load_file(whole / "model.safetensors")
    members = linear_layers(tensors)
    layers = {layer.name: layer for layer in found["sharded"].layers}
    assert layers.keys() == expected.keys()
    for name, q in expected.items():
        result = layers[name].results[setting]
        weight = torch.cat([tensors[f"{member}.weight"] for member in members[name]])
        has_hessian = name != WITHOUT_HESSIAN
        assert result.search == (setting if has_hessian or setting != "hessian" else "optimal")
        q = q if has_hessian or setting != "hessian" else expected_optimal[name]
        assert (result.signal, result.noise) == pytest.approx([float(e) for e in signal_and_noise(weight, q)], rel=1e-6)
        output = [float(e) for e in output_signal_and_noise(weight, q, hessians[name])]
        assert (result.output_signal, result.output_noise) == (pytest.approx(output) if has_hessian else (None, None))
        assert result.nbytes == q.nbytes
        assert layers[name].members == members[name]
        assert layers[name].shape == tuple(weight.shape)


def test_experts_of_a_layer_are_measured_together(found):
    tensors = load_file(found["mixture checkpoint"] / "model.safetensors")
    expected = quantize_checkpoint(found["mixture checkpoint"], scale_search="naive")
    layers = {layer.name: layer for layer in found["mixture"].layers}
    for mixture in mixture_layers(QWEN3):
        for name, members, last in (
            ("w13", ["gate_proj", "up_proj"], "gate_up_proj"),
            ("w2", ["down_proj"], "down_proj"),
        ):
            experts = [f"{mixture}.experts.{expert}" for expert in range(EXPERTS)]
            parts = [
                (torch.cat([tensors[f"{expert}.{m}.weight"] for m in members]), expected[f"{expert}.{last}"])
                for expert in experts
            ]
            layer = layers[f"{mixture}.experts.{name}"]
            assert layer.members == [f"{expert}.{member}" for expert in experts for member in members]
            assert layer.shape == (sum(len(weight) for weight, _ in parts), parts[0][0].shape[1])
            energies = [
                sum(map(float, each)) for each in zip(*(signal_and_noise(*part) for part in parts), strict=True)
            ]
            result = layer.results["naive"]
            assert [result.signal, result.noise] == pytest.approx(energies, rel=1e-6)
            h = [found["expert hessians"][f"{expert}.{name}"] for expert in experts]
            outputs = [output_signal_and_noise(*part, each) for part, each in zip(parts, h, strict=True)]
            output = [sum(map(float, each)) for each in zip(*outputs, strict=True)]
            assert [result.output_signal, result.output_noise] == pytest.approx(output)
            assert result.nbytes == sum(q.nbytes for _, q in parts)
    assert not [module.name for module in found["mixture"].left if "experts" in module.name]


def test_what_is_left_is_said(found):
    inspection = found["sharded"]
    assert inspection.unused == {"naive": [], "optimal": [], "hessian": [], "ignoring": ["nothing"]}
    for layer in inspection.layers:
        ignored = layer.name.endswith("o_proj")
        assert (layer.results["ignoring"] == "ignored") == ignored
        assert ignored or layer.results["ignoring"].nbytes < layer.results["optimal"].nbytes
    reasons = {module.name: module.reason for module in inspection.left}
    assert reasons["lm_head"] == reasons["model.embed_tokens"] == "embedding or head"
    assert reasons["model.norm"] == "norm or other"
    assert reasons[LAYER] == "bias"
    tensors = load_file(found["whole"] / "model.safetensors")
    dense = sum(layer.nbytes for layer in inspection.layers) + sum(module.nbytes for module in inspection.left)
    assert dense == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("foreign", "was measured on another model: 'other'"),
        ("lacking", f"lacks weights of 1 layers: {LAYER}"),
        ("strict", f"has no layer '{WITHOUT_HESSIAN}'"),
    ],
)
def test_what_does_not_fit_is_refused(found, case, message):
    assert isinstance(found[case], ValueError)
    assert message in str(found[case])


def test_the_command_prints_and_writes(found, tmp_path, monkeypatch):
    def inspect_model(model, settings, hessian, dtype):
        assert (model, list(settings), dtype) == (str(found["whole"]), ["naive", "optimal"], "auto")
        return found["sharded"]

    monkeypatch.setattr("qwantize_vllm.plugin.inspection.inspect_model", inspect_model)
    monkeypatch.setattr(command.os, "environ", {})
    arguments = ["inspect", str(found["whole"]), "--out", str(tmp_path / "out"), "--show", "3"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert "worst layers by output error under ignoring" in result.output
    assert "ignoring: the ignore pattern 'nothing' names no layer" in result.output
    record = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert len(record["layers"]) == 8
    assert LAYER in (tmp_path / "out" / "inspect.html").read_text("utf-8")


def test_layers_of_towers_are_those_of_the_settings_that_quantize_them(found):
    def quantized(case, setting):
        layers = found[case].layers
        return {layer.name for layer in layers if not isinstance(layer.results.get(setting, ""), str)}

    assert len(quantized("towers", "quantize")) == 16
    assert quantized("towers", "leave") == quantized("towers left", "leave")
    assert len(quantized("towers", "leave")) == 8
