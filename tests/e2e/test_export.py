"""Exported checkpoints in real engines: the codes of online serving, from files that stock vLLM loads too."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwantize_vllm import Nvfp4Tensor
from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint
from qwantize_vllm.checkpoint.export import NOTES
from qwantize_vllm.hessian import HessianInfo, save_hessians

from .checkpoints import QWEN2, TINY_LAYERS, linear_layers, quantize_checkpoint, random_hessians, write_tiny
from .compare import assert_serves, served_layers, settings_of, tensors_of, token_ids
from .conftest import TINY_PROMPTS, Engines
from .engine import in_forked_process
from .probe import probe
from .test_inspection import in_shards
from .test_tensor_parallel import TWO_RANKS, join

pytestmark = pytest.mark.e2e

HESSIAN = {"scale_search": "hessian"}
# By name: settings, layout. Files of Hessians are added.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "optimal": ({}, "compressed-tensors"),
    "codes": ({**HESSIAN, "refine": "codes"}, "modelopt"),
    "gptq": ({**HESSIAN, "refine": "gptq"}, "compressed-tensors"),
    "blocks of 32": ({"block_size": 32, "ignore": ["*.1.self_attn.o_proj"]}, "compressed-tensors"),
    "own": ({"block_size": 32, "global_scale": "amax_per_member"}, "qwantize"),
}
IGNORED = "model.layers.1.self_attn.o_proj"


def export_each(cases: list[tuple[Any, ...]]) -> list[Any]:
    """In a process that imports vLLM once: what exporting each of the cases gives, or the error that it raises."""
    from qwantize_vllm.plugin.exporting import _export

    results: list[Any] = []
    for case in cases:
        try:
            results.append(_export(*case))
        except ValueError as error:
            results.append(str(error))
    return results


@dataclasses.dataclass(frozen=True)
class Found:
    """The dense checkpoint, its Hessians (of gptq in full), the exports by case, and what `_export` gave or raised."""

    dense: Path
    hessians: dict[str, dict[str, torch.Tensor]]
    folder: Path
    results: dict[str, Any]

    def expected(self, case: str) -> dict[str, Nvfp4Tensor]:
        """What an engine that quantizes online holds."""
        settings, _ = CASES[case]
        search = {key: value for key, value in settings.items() if key in ("scale_search", "block_size", "refine")}
        hessians = self.hessians["gptq" if case == "gptq" else "codes"] if "scale_search" in settings else None
        return quantize_checkpoint(self.dense, hessians=hessians, **search)

    def changed(self, case: str, out: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
        """A copy of an export in one file, edited: its tensors, its quantization_config."""
        shutil.copytree(self.folder / case, out)
        checkpoint = Checkpoint(out)
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        for path in (*out.glob("*.safetensors"), *out.glob("*.index.json")):
            path.unlink()
        config = json.loads((out / "config.json").read_text())
        change(tensors, config["quantization_config"])
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config))
        return out


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("export")
    dense = write_tiny(folder / "dense", **QWEN2)
    hessians = {"codes": random_hessians(dense), "gptq": random_hessians(dense, full=True)}
    for name, each in hessians.items():
        save_hessians(folder / f"{name}.safetensors", each, 16, HessianInfo(block_size=16, full=name == "gptq"))
    sharded = in_shards(Path(shutil.copytree(dense, folder / "sharded")))
    lacking = Path(shutil.copytree(dense, folder / "lacking"))
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    jobs = {}
    for name, (settings, layout) in CASES.items():
        file = {"hessian": str(folder / f"{name}.safetensors")} if "scale_search" in settings else {}
        jobs[name] = (str(sharded), folder / name, {**settings, **file}, layout, "auto", 2**17)
    jobs["lacking"] = (str(lacking), folder / "no", {}, "compressed-tensors", "auto", 2**17)
    jobs["per member"] = (str(sharded), folder / "no", {"global_scale": "amax_per_member"}, "modelopt", "auto", 2**17)
    fewer = {name: each for name, each in hessians["codes"].items() if name != IGNORED}
    save_hessians(folder / "fewer.safetensors", fewer, 16)
    given = {**HESSIAN, "hessian": str(folder / "fewer.safetensors"), "ignore": ["*.o_prj"]}
    jobs["fewer"] = (str(sharded), folder / "fewer", given, "compressed-tensors", "auto", 2**17)
    results = in_forked_process(export_each, list(jobs.values()))
    return Found(dense, hessians, folder, dict(zip(jobs, results, strict=True)))


def test_what_cannot_be_exported_is_refused(found):
    assert "lacks weights of model.layers.1.self_attn.qkv_proj" in found.results["lacking"]
    assert "amax_per_member cannot be written as modelopt" in found.results["per member"]
    assert not (found.folder / "no").exists()
    assert not (found.folder / "no.partial").exists()


def test_what_is_done_is_said(found):
    done = found.results["blocks of 32"]
    assert len(done.quantized) == 4 * TINY_LAYERS - 1
    assert done.left == {IGNORED: "ignored"}
    assert done.bytes_read > 2 * done.bytes_written


def test_what_is_done_otherwise_than_asked_is_said_and_noted(found):
    """A Hessian file that lacks a layer, and a pattern with a slip."""
    done = found.results["fewer"]
    assert done.by_optimal == {IGNORED: "the Hessian file does not have it"}
    assert done.unused == ["*.o_prj"]
    assert found.results["codes"].by_optimal == {}
    notes = json.loads((found.folder / "fewer" / NOTES).read_text())
    assert notes["export"]["settings"]["by_optimal"] == done.by_optimal


@pytest.mark.parametrize("case", CASES)
def test_codes_on_disk_are_those_of_online_serving(found, case):
    _, name = CASES[case]
    layout, checkpoint = LAYOUTS[name], Checkpoint(found.folder / case)
    assert len(checkpoint.files) > 1
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    dense = load_file(found.dense / "model.safetensors")
    block_size = CASES[case][0].get("block_size", 16) if layout.any_blocks else 16
    for fused, q in found.expected(case).items():
        if case == "blocks of 32" and fused == IGNORED:
            assert torch.equal(tensors[f"{fused}.weight"], dense[f"{fused}.weight"])
            continue
        members = [layout.read(member, tensors, block_size) for member in linear_layers(dense)[fused]]
        if case == "own" and len(members) > 1:
            parts = quantize_checkpoint(found.dense, fuse=False, block_size=32)
            for member, part in zip(linear_layers(dense)[fused], members, strict=True):
                assert torch.equal(part.codes, parts[member].codes)
                assert torch.equal(part.global_scale, parts[member].global_scale)
            continue
        assert torch.equal(torch.cat([member.codes for member in members]), q.codes), fused
        assert torch.equal(torch.cat([member.dequantize() for member in members]), q.dequantize())
        assert {float(member.global_scale) for member in members} == {float(q.global_scale)}


def reload_between(llm: Any) -> dict[str, Any]:
    first = probe(llm, TINY_PROMPTS)
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    return {**first, "again": probe(llm, TINY_PROMPTS)}


@pytest.fixture(scope="module")
def served(engines: Engines, found: Found) -> Any:
    """The optimal export, served and reloaded."""
    return engines.start(found.folder / "optimal", reload_between)


def test_the_export_serves_what_online_serving_serves(engines, found, served):
    online = engines.start(found.dense)
    expected = found.expected("optimal")
    assert served_layers(served) == served_layers(online) == set(expected)
    for layer, q in expected.items():
        assert_serves(tensors_of(served), layer, q)
        assert_serves(tensors_of(online), layer, q)
    assert token_ids(served) == token_ids(online)
    assert served.result["own_scores"] == online.result["own_scores"]
    (line,) = served.lines("nothing is searched")
    assert "NVFP4 already (compressed-tensors)" in line
    assert "8 layers are NVFP4 in the checkpoint (compressed-tensors), 2 left (2 embedding or head)" in served.log


def test_a_reload_reads_the_codes_again(found, served):
    again = served.result["again"]
    for layer, q in found.expected("optimal").items():
        assert_serves(again["models"][0]["tensors"], layer, q)
    assert again["own_scores"] == served.result["own_scores"]


@pytest.mark.parametrize("case", ["codes", "blocks of 32"])
def test_other_exports_serve_their_codes(engines, found, case):
    outcome = engines.start(
        found.folder / case,
        additional_config={"qwantize": {"scale_search": "naive", "strict": True}},
        hf_overrides={"quantization_config_file": "other.yaml"},
    )
    held = tensors_of(outcome)
    for layer, q in found.expected(case).items():
        if layer in served_layers(outcome):
            scales = q.block_scales.view(torch.uint8).repeat_interleave(q.block_size // 16, dim=1)
            again = Nvfp4Tensor(q.codes, scales.view(torch.float8_e4m3fn), q.global_scale)
            assert_serves(held, layer, again)
    assert (IGNORED in served_layers(outcome)) == (case == "codes")
    (line,) = outcome.lines("without effect on such a checkpoint: ")
    assert "scale_search (from --additional-config), the file other.yaml (from --hf-overrides)" in line
    assert settings_of(outcome)["strict"] is True


def test_a_checkpoint_that_names_qwantize_needs_no_flag(engines, found):
    outcome = engines.start(found.folder / "own", quantization=None)
    parts = quantize_checkpoint(found.dense, fuse=False, block_size=32)
    held = tensors_of(outcome)
    layer = "model.layers.0.self_attn.qkv_proj"
    members = [parts[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    assert torch.equal(held[f"{layer}.weight"], torch.cat([q.codes for q in members]))
    assert torch.equal(held[f"{layer}.weight_global_scale"], torch.stack([q.global_scale for q in members]))
    assert settings_of(outcome)["block_size"] == 32


def test_activations_of_four_bits_and_a_global_scale_for_each_member(engines, found, served, tmp_path):
    """As other tools write them: the one is said, the other served as it is, where vLLM takes the largest."""
    down, key = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"

    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        group = config["config_groups"]["group_0"]
        group["input_activations"] = {**group["weights"], "dynamic": "local"}
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            tensors[name.replace("weight_packed", "input_global_scale")] = torch.ones(1)
        tensors[f"{key}.weight_global_scale"] /= 2

    outcome = engines.start(found.changed("optimal", tmp_path / "w4a4", change))
    assert "(W4A4); they stay as they are" in outcome.log
    expected = found.expected("optimal")
    assert_serves(tensors_of(outcome), down, expected[down])
    g = expected["model.layers.0.self_attn.qkv_proj"].global_scale
    scales = tensors_of(outcome)["model.layers.0.self_attn.qkv_proj.weight_global_scale"]
    assert torch.equal(scales, torch.stack([g, 2 * g, g]))
    assert outcome.result["own_scores"] != served.result["own_scores"]


def drop(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors["model.layers.1.self_attn.v_proj.weight_packed"]


def break_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight_scale"].view(torch.uint8)[3, 2] = 0xFF


def break_global(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_global_scale"][0] = torch.nan


def other_type(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = "model.layers.0.mlp.down_proj.weight_packed"
    tensors[name] = tensors[name].float()


def awq(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config.clear()
    config |= {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


DAMAGED = {
    "lacks a tensor": (drop, "model.layers.1.self_attn.qkv_proj: the checkpoint lacks weight_packed of 1 of 3 members"),
    "NaN": (break_scale, "model.layers.1.mlp.down_proj: weight_scale holds 1 block scales that are NaN or negative"),
    "global scale": (break_global, "model.layers.0.mlp.gate_up_proj: weight_global_scale gives the global scales"),
    "dtype": (other_type, "model.layers.0.mlp.down_proj: tensor weight_packed is torch.float32 in the checkpoint"),
    "AWQ": (awq, "this one is quantized already, by awq. Leave --quantization out"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_foreign_checkpoints_are_refused(engines, found, tmp_path, case):
    change, message = DAMAGED[case]
    assert message in engines.refuse(found.changed("optimal", tmp_path / "changed", change))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (cut, {}, "cannot be read as safetensors: .*it ends within or before 1 tensors, '"),
        (flip, {"strict": True}, "the bytes of tensor '.*' are not those that were written"),
    ],
)
def test_damaged_files_are_named_before_they_are_loaded(engines, found, tmp_path, damage, settings, message):
    out = Path(shutil.copytree(found.folder / "optimal", tmp_path / "out"))
    path = sorted(out.glob("*.safetensors"))[1]
    damage(path)
    log = engines.refuse(out, additional_config={"qwantize": settings})
    assert re.search(rf"{path}:? {message}", log), log[-3000:]
    assert "Loading safetensors" not in log


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_ranks_share_the_codes_out(engines, found, served):
    two = engines.start(found.folder / "optimal", **TWO_RANKS)
    for layer, q in found.expected("optimal").items():
        held = [tensors_of(two, rank) for rank in range(2)]
        assert torch.equal(join(layer, [each[f"{layer}.weight"] for each in held]), q.codes)
        scales = join(layer, [each[f"{layer}.weight_scale"].view(torch.uint8) for each in held])
        assert torch.equal(scales, q.block_scales.view(torch.uint8))
        assert {float(each[f"{layer}.weight_global_scale"]) for each in held} == {float(q.global_scale)}
    assert token_ids(two) == token_ids(served)


def test_an_unfinished_directory_is_refused(engines, found, tmp_path):
    partial = Path(shutil.copytree(found.folder / "optimal", tmp_path / "out.partial"))
    (partial / "config.json").unlink()
    assert "config" in engines.refuse(partial)


def use_a_plain_kernel() -> None:
    """vLLM's kernels for NVFP4 need a GPU: give its scheme one of two lines, which dequantizes and multiplies."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_nvfp4 as scheme,
    )

    class Plain:
        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            pass

        def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            q = Nvfp4Tensor(layer.weight.data, layer.weight_scale.data, layer.weight_global_scale.data)
            return torch.nn.functional.linear(x, q.dequantize(x.dtype), bias)

        def input_quant_key(self) -> None:
            return None

    scheme.init_nvfp4_linear_kernel = lambda use_a16=False: Plain()


def test_stock_vllm_reads_the_export(engines, found, served):
    """Its config, scheme and loader, without this plugin; of it only the kernel is another."""
    prompts = functools.partial(probe, prompts=TINY_PROMPTS)
    stock = engines.start(
        found.folder / "optimal", prompts, {"VLLM_PLUGINS": ""}, quantization=None, before=use_a_plain_kernel
    )
    assert not stock.lines("qwantize")
    for layer, q in found.expected("optimal").items():
        assert_serves(tensors_of(stock), layer, q)
    assert token_ids(stock) == token_ids(served)
