"""Exported mixtures of experts: what online serving holds, on disk and served, by this plugin and by stock vLLM."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import types
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwantize_vllm import Nvfp4Tensor
from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint
from qwantize_vllm.checkpoint.export import NOTES
from qwantize_vllm.hessian import HessianInfo, save_hessians

from .checkpoints import random_hessians
from .compare import sequences_of, served_layers, tensors_of, token_ids
from .conftest import TINY_PROMPTS, Engines
from .engine import Outcome, in_forked_process
from .moe_checkpoints import DEEPSEEK, EXPERTS, MIXTRAL, NAMES, QWEN3, mixture_layers, write_moe
from .probe import probe
from .test_export import Found, export_each, reload_between, use_a_plain_kernel
from .test_moe import ARGUMENTS, assert_ranks_hold_experts
from .test_tensor_parallel import TWO_RANKS

pytestmark = pytest.mark.e2e

IGNORED, UNREACHED = "model.layers.1.mlp.experts", 2
# By name: model, settings, layout. The file of Hessians is added, in which expert UNREACHED has none.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mixtral": (MIXTRAL, {}, "compressed-tensors"),
    "qwen3": (QWEN3, {"scale_search": "hessian", "refine": "codes", "ignore": [IGNORED]}, "modelopt"),
    "deepseek": (DEEPSEEK, {"block_size": 32, "global_scale": "amax_per_member"}, "qwantize"),
}
SHARD_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class Exported:
    """By case: dense checkpoints, settings, exports, and what `_export` gave."""

    dense: dict[str, Path]
    settings: dict[str, dict[str, Any]]
    folder: Path
    done: dict[str, Any]

    def job(self, case: str, out: Path) -> tuple[Any, ...]:
        return str(self.dense[case]), out, self.settings[case], CASES[case][2], "auto", SHARD_BYTES

    def experts_on_disk(self, case: str) -> Iterator[tuple[str, int, list[Nvfp4Tensor]]]:
        """(mixture, number, [gate, up, down]) of every expert that is quantized."""
        config, settings, layout = CASES[case]
        checkpoint, (_, names) = Checkpoint(self.folder / case), NAMES[config["model_type"]]
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        for mixture in mixture_layers(config):
            if f"{mixture}.experts" in settings.get("ignore", []):
                continue
            for expert in range(EXPERTS):
                at = f"{mixture}.experts.{expert}"
                size = settings.get("block_size", 16)
                yield mixture, expert, [LAYOUTS[layout].read(f"{at}.{name}", tensors, size) for name in names]


def expert_hessians(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Random ones by the names that files of Hessians have; those of the experts UNREACHED are zero."""
    names = {"gate_up_proj": "w13", "down_proj": "w2"}
    hessians = {}
    for layer, hessian in random_hessians(checkpoint).items():
        parent, _, last = layer.rpartition(".")
        name = f"{parent}.{names[last]}" if ".experts." in layer else layer
        hessians[name] = torch.zeros_like(hessian) if f".experts.{UNREACHED}." in layer else hessian
    return hessians


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("experts")
    found = Exported({}, {}, folder, {})
    for case, (config, settings, _) in CASES.items():
        found.dense[case] = write_moe(folder / f"{case}-dense", config)
        found.settings[case] = dict(settings)
    path = folder / "hessians.safetensors"
    save_hessians(path, expert_hessians(found.dense["qwen3"]), 16, HessianInfo(block_size=16))
    found.settings["qwen3"]["hessian"] = str(path)
    jobs = {case: found.job(case, folder / case) for case in CASES}
    lacking = write_moe(folder / "lacking-dense", QWEN3)
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    jobs["lacking"] = (str(lacking), folder / "lacking", {}, "compressed-tensors", "auto", SHARD_BYTES)
    found.done.update(zip(jobs, in_forked_process(export_each, list(jobs.values())), strict=True))
    return found


@pytest.fixture(scope="module")
def online(engines: Engines, exported: Exported) -> Any:
    """Case -> the engine that quantizes while loading; that of Mixtral keeps its layers in a cache."""

    @functools.cache
    def start(case: str) -> Outcome:
        settings = {**exported.settings[case], **cache_of(exported, case)}
        return engines.start(exported.dense[case], additional_config={"qwantize": settings}, **ARGUMENTS)

    return start


def cache_of(exported: Exported, case: str) -> dict[str, str]:
    return {"cache_dir": str(exported.folder / "cache")} if case == "mixtral" else {}


@pytest.fixture(scope="module")
def served(engines: Engines, exported: Exported) -> Any:
    """Case -> the engine that serves the export; that of Mixtral reloads it."""

    @functools.cache
    def start(case: str) -> Outcome:
        # A checkpoint of this package's own needs no flag.
        quantization = None if CASES[case][2] == "qwantize" else "qwantize"
        use = reload_between if case == "mixtral" else None
        return engines.start(exported.folder / case, use, quantization=quantization, **ARGUMENTS)

    return start


def assert_hold_the_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(bits(tensor), bits(other[name])), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("case", CASES)
def test_the_export_serves_what_online_serving_serves(exported, online, served, case):
    ours, theirs = served(case), online(case)
    assert_hold_the_same(tensors_of(ours), tensors_of(theirs))
    assert token_ids(ours) == token_ids(theirs)
    assert ours.result["own_scores"] == theirs.result["own_scores"]
    line, *_ = ours.lines("qwantize summary:")
    layers = len(served_layers(ours)) + len(mixture_layers(CASES[case][0])) - (case == "qwen3")
    assert f"{layers} layers are NVFP4 in the checkpoint ({CASES[case][2]})" in line
    assert len(exported.done[case].quantized) == layers


@pytest.mark.parametrize("case", CASES)
def test_codes_on_disk_are_those_of_online_serving(exported, online, case):
    held = tensors_of(online(case))
    seen = 0
    for mixture, expert, (gate, up, down) in exported.experts_on_disk(case):
        for weight, members in (("w13", [gate, up]), ("w2", [down])):
            at = f"{mixture}.experts.routed_experts.{weight}_weight"
            assert torch.equal(torch.cat([q.codes for q in members]), held[at][expert])
            scales = torch.cat([bits(q.block_scales) for q in members])
            assert torch.equal(scales, bits(held[f"{at}_scale"][expert]))
            factors = held[f"{at}_global_scale"][expert]
            assert torch.equal(torch.stack([q.global_scale for q in members]), factors.expand(len(members)))
        assert (gate.global_scale == up.global_scale) == (case != "deepseek")
        seen += 1
    assert seen == EXPERTS * (1 if case == "qwen3" else len(mixture_layers(CASES[case][0])))


def test_gates_and_experts_that_are_left_are_in_the_ignore_list(exported):
    config = json.loads((exported.folder / "qwen3" / "config.json").read_text())["quantization_config"]
    gates = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    left = [f"{IGNORED}.{i}.{name}_proj" for i in range(EXPERTS) for name in ("gate", "up", "down")]
    assert sorted(config["ignore"]) == sorted(["lm_head", "model.embed_tokens", *gates, *left])
    assert exported.done["qwen3"].left == {gates[0]: "gate", gates[1]: "gate", IGNORED: "ignored"}
    dense, written = Checkpoint(exported.dense["qwen3"]), Checkpoint(exported.folder / "qwen3")
    for module in config["ignore"]:
        assert torch.equal(written.read(f"{module}.weight"), dense.read(f"{module}.weight"))


def test_a_checkpoint_that_lacks_an_experts_weight_is_refused(exported):
    said = exported.done["lacking"]
    assert "lacks weights of model.layers.1.mlp.experts.3.w13: of its 128 rows it has those of model.layers.1" in said
    assert not (exported.folder / "lacking").exists()


def test_compressed_tensors_decompresses_experts_to_the_bits_of_dequantize(exported):
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    checkpoint, (_, names) = Checkpoint(exported.folder / "mixtral"), NAMES["mixtral"]
    layout = LAYOUTS["compressed-tensors"]
    for mixture, expert, weights in exported.experts_on_disk("mixtral"):
        for name, q in zip(names, weights, strict=True):
            at = f"{mixture}.experts.{expert}.{name}"
            state = {each: checkpoint.read(f"{at}.{each}") for each in layout.names}
            theirs = nvfp4.NVFP4PackedCompressor.decompress(state, None)["weight"]
            assert theirs.dtype == torch.bfloat16
            assert torch.equal(bits(theirs), bits(q.dequantize(torch.bfloat16)))


def export_and_die(last: int, *job: Any) -> None:
    """Kill this process before its file operation number `last` on what it writes."""
    from qwantize_vllm.plugin.exporting import _export

    done = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(job[1]) in str(arguments[0]):
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    sys.addaudithook(count)
    _export(*job)


@pytest.mark.parametrize("last", [25, 45])
def test_killed_a_second_run_finishes_it(exported, tmp_path, last):
    job = exported.job("mixtral", tmp_path / "out")
    with pytest.raises(BrokenProcessPool):
        in_forked_process(export_and_die, last, *job)
    partial = tmp_path / "out.partial"
    noted = json.loads((partial / NOTES).read_text())["shards"]
    left = {name: (partial / name).stat().st_mtime_ns for name in noted}
    assert left
    assert not (partial / "config.json").exists()
    assert not (tmp_path / "out").exists()
    in_forked_process(export_each, [job])
    whole = {path.name: path.read_bytes() for path in (exported.folder / "mixtral").iterdir()}
    assert len(left) < sum(name.endswith(".safetensors") for name in whole)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in left.items())


def test_a_reload_reads_the_codes_again(served):
    again = served("mixtral").result["again"]
    assert_hold_the_same(again["models"][0]["tensors"], tensors_of(served("mixtral")))
    assert again["own_scores"] == served("mixtral").result["own_scores"]


def test_the_second_start_has_experts_from_the_cache(engines, exported, online):
    settings = cache_of(exported, "mixtral")
    assert "from cache_dir" not in online("mixtral").log
    second = engines.start(exported.dense["mixtral"], additional_config={"qwantize": settings}, **ARGUMENTS)
    assert "6 layers quantized to NVFP4 (optimal, blocks of 16, 6 of them from cache_dir)" in second.log
    assert_hold_the_same(tensors_of(second), tensors_of(online("mixtral")))


def use_plain_kernels() -> None:
    """vLLM's kernels for NVFP4 need a GPU: its method for experts, too, gets one that dequantizes and multiplies."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as method,
    )

    from qwantize_vllm.matmul.experts_cpu import experts_one_by_one

    names = ("w13", "w13_scale", "w13_scale_2", "a13_scale", "w2", "w2_scale", "w2_scale_2", "a2_scale")

    class Plain:
        is_monolithic = consumes_expert_mask = can_overlap_shared_experts = False
        prepare_finalize = types.SimpleNamespace(topk_indices_dtype=lambda: None)

        def __init__(self, scales: Mapping[str, torch.Tensor]) -> None:
            self.scales, self.fused_experts = scales, self

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            pass

        def output_is_reduced(self) -> bool:
            return False

        def apply(self, x: Any, w13: Any, w2: Any, weights: Any, ids: Any, *, activation: Any, **_: Any) -> Any:
            dense = []
            for name, codes in (("w13", w13), ("w2", w2)):
                scales = (self.scales[f"{name}_scale"], self.scales[f"{name}_scale_2"])
                dense.append(Nvfp4Tensor(codes.data, *(each.data for each in scales)).dequantize(x.dtype))
            linear = torch.nn.functional.linear
            return experts_one_by_one(x, dense[:1], dense[1], weights, ids, activation.value, linear, None)

    use_a_plain_kernel()
    method.select_nvfp4_moe_backend = lambda **_: (None, Plain)
    method.convert_to_nvfp4_moe_kernel_format = lambda **given: tuple(given[name] for name in names)
    method.make_nvfp4_moe_quant_config = lambda **given: given
    method.make_nvfp4_moe_kernel = lambda *, moe_quant_config, **_: Plain(moe_quant_config)


def test_stock_vllm_reads_the_export(engines, exported, served):
    """Its config, method and loader, without this plugin; of it only the kernels are others."""
    prompts = functools.partial(probe, prompts=TINY_PROMPTS)
    stock = engines.start(
        exported.folder / "mixtral",
        prompts,
        {"VLLM_PLUGINS": ""},
        quantization=None,
        before=use_plain_kernels,
        **ARGUMENTS,
    )
    assert not stock.lines("qwantize: ")
    for mixture in mixture_layers(MIXTRAL):
        for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            at = f"{mixture}.experts.routed_experts.{name}"
            assert torch.equal(bits(tensors_of(stock)[at]), bits(tensors_of(served("mixtral"))[at])), at
    assert token_ids(stock) == token_ids(served("mixtral"))


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_ranks_share_the_rows_and_columns_out(engines, exported, served):
    two = engines.start(exported.folder / "mixtral", **ARGUMENTS, **TWO_RANKS)
    for mixture in mixture_layers(MIXTRAL):
        assert_ranks_hold_experts(
            mixture, tensors_of(served("mixtral")), [tensors_of(two, rank) for rank in range(2)], False
        )
    assert token_ids(two) == token_ids(served("mixtral"))


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_ranks_share_the_experts_out_that_other_tools_wrote(engines, exported, served, tmp_path):
    """With activations of four bits too, which is said, and with global scales of gate and up that differ, which stay
    as they are, where vLLM takes that of gate for both."""
    up = "model.layers.0.block_sparse_moe.experts.1.w3.weight_global_scale"

    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        group = config["config_groups"]["group_0"]
        group["input_activations"] = {**group["weights"], "dynamic": "local"}
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            tensors[name.replace("weight_packed", "input_global_scale")] = torch.ones(1)
        tensors[up] /= 2

    source = Found(exported.dense["mixtral"], {}, exported.folder, {})
    use = functools.partial(probe, prompts=TINY_PROMPTS, sequences=sequences_of(served("mixtral")))
    w4a4 = source.changed("mixtral", tmp_path / "w4a4", change)
    two = engines.start(w4a4, use, **ARGUMENTS, **TWO_RANKS, enable_expert_parallel=True)
    assert "(W4A4); they stay as they are" in two.log
    one = tensors_of(served("mixtral"))
    for layer, part in ((0, "_global_scale"), (1, "_global_scale"), (0, ""), (0, "_scale"), (1, "")):
        name = f"model.layers.{layer}.block_sparse_moe.experts.routed_experts.w13_weight{part}"
        expected = one[name]
        if (layer, part) == (0, "_global_scale"):
            expected = expected.expand(-1, 2).clone()
            expected[1, 1] *= 2
            # Where the members of all of a rank's experts agree, one is kept for both.
            assert torch.equal(tensors_of(two, 0)[name], expected[: EXPERTS // 2])
            assert torch.equal(tensors_of(two, 1)[name], expected[EXPERTS // 2 :, :1])
            continue
        held = torch.cat([bits(tensors_of(two, rank)[name]) for rank in range(2)])
        assert torch.equal(held, bits(expected)), name
    assert two.result["scores"] != served("mixtral").result["own_scores"]
