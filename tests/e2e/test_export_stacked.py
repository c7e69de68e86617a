"""Exports of checkpoints that hold all experts of a layer in one tensor: one by one, as online serving holds them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4
from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint
from qwantize_vllm.checkpoint.export import verify

from .architectures import write_causal
from .compare import tensors_of, token_ids
from .conftest import TINY_PROMPTS, Engines
from .engine import Outcome, in_forked_process
from .moe_checkpoints import QWEN3, write_moe
from .probe import probe
from .test_export import export_each
from .test_export_moe import assert_hold_the_same, bits, use_plain_kernels

pytestmark = pytest.mark.e2e

EXPERTS, LAYERS, SHARD_BYTES = 4, 2, 2**16
ARGUMENTS = {"dtype": "float32", "max_num_seqs": 1}
# vLLM permutes the rows of Llama 4's q and k while loading, so an export leaves these layers as they are.
ATTENTION = ["*.self_attn.qkv_proj"]
PER_MEMBER = {"block_size": 32, "global_scale": "amax_per_member"}
# By name: model, settings, layout.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "rows": ("qwen3", {}, "compressed-tensors"),
    "rows, modelopt": ("qwen3", {}, "modelopt"),
    "transposed": ("llama4", {"ignore": ATTENTION}, "compressed-tensors"),
    "transposed, modelopt": ("llama4", {"ignore": ATTENTION}, "modelopt"),
    "transposed, own": ("llama4", {**PER_MEMBER, "ignore": ATTENTION}, "qwantize"),
    "other names": ("granite", {}, "compressed-tensors"),
    "other names, own": ("granite", PER_MEMBER, "qwantize"),
}
SLOWER = ("rows, modelopt", "transposed, modelopt", "other names, own")
SERVED = [pytest.param(case, marks=pytest.mark.slow) if case in SLOWER else case for case in CASES]
MIXTURES = {"qwen3": "mlp", "llama4": "feed_forward", "granite": "block_sparse_moe"}
TENSORS = {"granite": ("input_linear.weight", "output_linear.weight")}
IGNORED = "model.layers.0.feed_forward.experts"


def write_stacked_qwen3(path: Path) -> Path:
    """As Qwen3-Next and others have them, (E, N, K), in the first layer; the second has them one by one."""
    dense = write_moe(path, {**QWEN3, "moe_intermediate_size": 96})
    tensors = load_file(dense / "model.safetensors")
    at = "model.layers.0.mlp.experts"

    def pop(name: str) -> torch.Tensor:
        return torch.stack([tensors.pop(f"{at}.{i}.{name}_proj.weight") for i in range(EXPERTS)])

    tensors[f"{at}.gate_up_proj"] = torch.cat([pop("gate"), pop("up")], dim=1)
    tensors[f"{at}.down_proj"] = pop("down")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    return dense


@dataclasses.dataclass(frozen=True)
class Exported:
    """Dense checkpoints by model, and by case what `_export` gave."""

    dense: dict[str, Path]
    folder: Path
    done: dict[str, Any]

    def matrices(self, case: str) -> Iterator[tuple[str, int, list[Nvfp4Tensor]]]:
        """(mixture, number, [gate, up, down]) of every expert, from what is on the disk."""
        model, settings, layout = CASES[case]
        checkpoint, size = Checkpoint(self.folder / case), settings.get("block_size", 16)
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        for i in range(LAYERS):
            mixture = f"model.layers.{i}.{MIXTURES[model]}"
            for expert in range(EXPERTS):
                names = [f"{mixture}.experts.{expert}.{name}_proj" for name in ("gate", "up", "down")]
                yield mixture, expert, [LAYOUTS[layout].read(name, tensors, size) for name in names]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("stacked")
    dense = {name: write_causal(name, folder / f"{name}-dense") for name in ("llama4", "granite")}
    dense["qwen3"] = write_stacked_qwen3(folder / "qwen3-dense")
    jobs = {
        case: (str(dense[model]), folder / case, settings, layout, "auto", SHARD_BYTES)
        for case, (model, settings, layout) in CASES.items()
    }
    settings = {"ignore": [*ATTENTION, IGNORED]}
    jobs["mixed"] = (str(dense["llama4"]), folder / "mixed", settings, "compressed-tensors", "auto", SHARD_BYTES)
    done = in_forked_process(export_each, list(jobs.values()))
    return Exported(dense, folder, dict(zip(jobs, done, strict=True)))


@pytest.fixture(scope="module")
def online(engines: Engines, exported: Exported) -> Callable[[str], Outcome]:
    """Case -> the engine that quantizes while loading."""

    @functools.cache
    def start(model: str, settings: str) -> Outcome:
        return engines.start(exported.dense[model], additional_config={"qwantize": json.loads(settings)}, **ARGUMENTS)

    return lambda case: start(CASES[case][0], json.dumps(CASES[case][1]))


@pytest.mark.parametrize("case", SERVED)
def test_the_export_serves_what_online_serving_serves(engines, exported, online, case):
    quantization = None if CASES[case][2] == "qwantize" else "qwantize"
    ours, theirs = engines.start(exported.folder / case, quantization=quantization, **ARGUMENTS), online(case)
    assert_hold_the_same(tensors_of(ours), tensors_of(theirs))
    assert token_ids(ours) == token_ids(theirs)
    assert ours.result["own_scores"] == theirs.result["own_scores"]
    mixtures = [f"model.layers.{i}.{MIXTURES[CASES[case][0]]}.experts" for i in range(LAYERS)]
    assert set(mixtures) <= set(exported.done[case].quantized)
    assert f"{len(exported.done[case].quantized)} layers are NVFP4 in the checkpoint ({CASES[case][2]})" in ours.log


@pytest.mark.parametrize("case", CASES)
def test_codes_on_disk_are_those_of_online_serving(exported, online, case):
    held, seen = tensors_of(online(case)), 0
    for mixture, expert, (gate, up, down) in exported.matrices(case):
        for weight, members in (("w13", [gate, up]), ("w2", [down])):
            at = f"{mixture}.experts.routed_experts.{weight}_weight"
            assert torch.equal(torch.cat([q.codes for q in members]), held[at][expert])
            assert torch.equal(torch.cat([bits(q.block_scales) for q in members]), bits(held[f"{at}_scale"][expert]))
            factors = held[f"{at}_global_scale"][expert]
            assert torch.equal(torch.stack([q.global_scale for q in members]), factors.expand(len(members)))
        seen += 1
    assert seen == EXPERTS * LAYERS
    assert verify(exported.folder / case) == len(Checkpoint(exported.folder / case).tensors)


@pytest.mark.parametrize("case", ["transposed", "other names"])
def test_codes_are_those_of_the_slices_as_transformers_multiplies_them(exported, case):
    """Llama 4 multiplies x by a slice, (K, N), GraniteMoe by its transpose; of both gate comes first."""
    model = CASES[case][0]
    dense = load_file(exported.dense[model] / "model.safetensors")
    w13, w2 = TENSORS.get(model, ("experts.gate_up_proj", "experts.down_proj"))
    for mixture, expert, (gate, up, down) in exported.matrices(case):
        for name, members in ((w13, [gate, up]), (w2, [down])):
            weight = dense[f"{mixture}.{name}"][expert]
            q = quantize_nvfp4(weight.T.contiguous() if model == "llama4" else weight)
            assert torch.equal(torch.cat([member.codes for member in members]), q.codes)


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_stacked_tensors_is_left(exported, case):
    written, dense = Checkpoint(exported.folder / case), Checkpoint(exported.dense[CASES[case][0]])
    stacked = {name for name, info in dense.tensors.items() if len(info.shape) == 3}
    assert stacked
    assert not [name for name, info in written.tensors.items() if len(info.shape) == 3]
    assert len(written.files) > 5  # the experts of a layer are in more than one
    config = json.loads((exported.folder / case / "config.json").read_text())["quantization_config"]
    assert not [name for name in config["ignore"] if "expert" in name.replace("shared_expert", "")]


def test_where_vllm_does_not_load_them_one_by_one_they_stay_and_that_is_said(exported):
    """Llama 4's loader takes stacked experts in all layers, or in none; here one layer is to be left."""
    done, stacked = exported.done["mixed"], Checkpoint(exported.dense["llama4"])
    other = "model.layers.1.feed_forward.experts"
    assert done.left[IGNORED] == "ignored"
    assert done.left[other].startswith("vLLM does not load its experts one by one: ")
    assert not [name for name in done.quantized if name.endswith(".experts")]
    written = Checkpoint(exported.folder / "mixed")
    for name in (f"{layer}.{part}" for layer in (IGNORED, other) for part in ("gate_up_proj", "down_proj")):
        assert torch.equal(written.read(name), stacked.read(name))
    config = json.loads((exported.folder / "mixed" / "config.json").read_text())["quantization_config"]
    assert {f"{other}.{i}.{name}_proj" for i in range(EXPERTS) for name in ("gate", "up", "down")} < {*config["ignore"]}


def test_an_export_with_experts_that_stay_is_served(engines, exported):
    """The same as if online serving had been told to leave them."""
    settings = {"ignore": [*ATTENTION, "*.feed_forward.experts"]}
    online = engines.start(exported.dense["llama4"], additional_config={"qwantize": settings}, **ARGUMENTS)
    ours = engines.start(exported.folder / "mixed", **ARGUMENTS)
    assert_hold_the_same(tensors_of(ours), tensors_of(online))
    assert token_ids(ours) == token_ids(online)


@pytest.mark.parametrize("case", ["transposed", "other names"])
def test_stock_vllm_reads_the_export(engines, exported, online, case):
    """Its config, method and loader, without this plugin; of it only the kernels are others."""
    prompts = functools.partial(probe, prompts=TINY_PROMPTS)
    stock = engines.start(
        exported.folder / case,
        prompts,
        {"VLLM_PLUGINS": ""},
        quantization=None,
        before=use_plain_kernels,
        **ARGUMENTS,
    )
    assert not stock.lines("qwantize: ")
    held, theirs = tensors_of(stock), tensors_of(online(case))
    for i in range(LAYERS):
        for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            at = f"model.layers.{i}.{MIXTURES[CASES[case][0]]}.experts.routed_experts.{name}"
            assert torch.equal(bits(held[at]), bits(theirs[at])), at
