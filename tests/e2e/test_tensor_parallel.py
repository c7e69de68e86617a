"""Two ranks hold and measure together what one rank does."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qwantize_vllm.hessian import HessianFile, save_hessians

from .checkpoints import random_hessians, write_byte_tokenizer, write_tiny
from .compare import assert_scores_agree, sequences_of, served_layers, tensors_of
from .conftest import TINY_PROMPTS
from .moe_checkpoints import MIXTRAL, write_moe
from .probe import probe
from .test_commands import run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores"),
]

TWO_RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
# Rows of the members of a fused layer: each of them is cut in two, and a rank holds a half of each.
MEMBERS = {"qkv_proj": [128, 64, 64], "gate_up_proj": [256, 256], "o_proj": [128], "down_proj": [128]}
ROW_PARALLEL = ("o_proj", "down_proj")
# `qwantize`, calibrating in float32: in bfloat16 the order in which ranks add up their shares shows.
IN_FLOAT32 = """
from qwantize_vllm.cli import app
from qwantize_vllm.plugin import calibration

calibrate = calibration.calibrate
calibration.calibrate = lambda *given, **named: calibrate(*given[:-1], {**given[-1], "dtype": "float32"}, **named)
app()
"""


def join(layer: str, parts: list[torch.Tensor], members: Mapping[str, list[int]] = MEMBERS) -> torch.Tensor:
    """Codes or scales of all ranks, in the order of one rank."""
    name = layer.rpartition(".")[2]
    if name in ROW_PARALLEL:
        return torch.cat(parts, dim=1)
    halves = [part.split([rows // len(parts) for rows in members[name]]) for part in parts]
    return torch.cat([half for member in zip(*halves, strict=True) for half in member])


def assert_ranks_hold(
    layer: str,
    one: Mapping[str, torch.Tensor],
    ranks: list[Mapping[str, torch.Tensor]],
    members: Mapping[str, list[int]] = MEMBERS,
) -> None:
    """What all ranks hold of a layer is what one rank alone does."""
    for name in ("weight", "weight_scale"):
        joined = join(layer, [rank[f"{layer}.{name}"].view(torch.uint8) for rank in ranks], members)
        assert torch.equal(joined, one[f"{layer}.{name}"].view(torch.uint8)), (layer, name)
    for rank in ranks:
        assert torch.equal(rank[f"{layer}.weight_global_scale"], one[f"{layer}.weight_global_scale"]), layer


@pytest.mark.parametrize(
    "search",
    [{"scale_search": "hessian"}, pytest.param({"global_scale": "amax_per_member"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_two_ranks_hold_the_codes_of_one(engines, tiny, tmp_path, search):
    settings = {"quant_method": "qwantize", **search}
    if search.get("scale_search") == "hessian":
        settings["hessian"] = str(tmp_path / "hessians.safetensors")
        save_hessians(settings["hessian"], random_hessians(tiny), block_size=16)
    # In float32, so that the order in which ranks add up their shares does not show in the scores.
    arguments = {"hf_overrides": {"quantization_config": settings}, "dtype": "float32"}
    one = engines.start(tiny, **arguments)
    use = functools.partial(probe, prompts=TINY_PROMPTS, sequences=sequences_of(one))
    two = engines.start(tiny, use, **arguments, **TWO_RANKS)

    ranks = [tensors_of(two, rank) for rank in range(2)]
    assert served_layers(one) == served_layers(two)
    for layer in served_layers(one):
        assert_ranks_hold(layer, tensors_of(one), ranks)
    assert_scores_agree(one.result["own_scores"], two.result["scores"], 1e-4)


@pytest.mark.slow
def test_nan_on_one_rank_ends_all(engines, broken):
    """The rank that holds no NaN waits for the other's amax: it must not wait for ever."""
    log = engines.refuse(broken, **TWO_RANKS)
    assert "qwantize: model.layers.1.mlp.gate_up_proj: weight (256, 128) holds 3 NaN and 2 infinite elements" in log


@pytest.fixture(params=["dense", "experts"])
def reader(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A tiny model with a tokenizer."""
    path = tmp_path / "reader"
    checkpoint = write_tiny(path) if request.param == "dense" else write_moe(path, MIXTRAL)
    write_byte_tokenizer(checkpoint)
    return checkpoint


def calibrate(checkpoint: Path, ranks: int, env: dict[str, str] | None = None) -> HessianFile:
    # Not into the checkpoint's folder: vLLM takes every safetensors file there for weights.
    text, out = (checkpoint.with_name(name) for name in ("text.txt", f"{ranks}.safetensors"))
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    options = ["--num-tokens", "200", "--seq-len", "64", "--tensor-parallel-size", str(ranks)]
    run(sys.executable, "-c", IN_FLOAT32, "calibrate", checkpoint, "--text", text, "--out", out, *options, env=env)
    return HessianFile(out)


@pytest.mark.slow
def test_two_ranks_calibrate_as_one(reader):
    one = calibrate(reader, 1)
    two = calibrate(reader, 2, TWO_RANKS["env"])
    assert (one.info.tokens, one.info.dtype) == (200, "float32")
    assert two.info == one.info
    assert two.names == one.names
    assert len(one.names) in (8, 20)  # without experts, with 4 a layer
    for name in one.names:
        whole, joined = one.read_all(name), two.read_all(name)
        assert joined.shape == whole.shape
        # Block by block, so that a small one counts as much; the order of sums has cost up to 5e-7.
        assert ((joined - whole).norm(dim=(1, 2)) <= 1e-5 * whole.norm(dim=(1, 2))).all(), name
