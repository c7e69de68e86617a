"""Mixtures of experts: quantized expert by expert, served from codes, the same as their dequantized checkpoints."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import statistics

import pytest
import torch

from qwantize_vllm.hessian import HessianFile

from .checkpoints import quantize_checkpoint, write_byte_tokenizer
from .compare import assert_agree, assert_scores_agree, assert_serves, sequences_of, served_layers, tensors_of
from .conftest import TINY_PROMPTS
from .moe_checkpoints import (
    DEEPSEEK,
    DEEPSEEK_V3,
    EXPERTS,
    HIDDEN,
    INNER,
    MIXTRAL,
    QWEN3,
    mixture_layers,
    stacked,
    write_moe,
)
from .probe import probe
from .test_commands import qwantize
from .test_reload import reload_twice
from .test_tensor_parallel import TWO_RANKS

pytestmark = pytest.mark.e2e
MODELS = {"mixtral": MIXTRAL, "qwen3": QWEN3, "deepseek": DEEPSEEK, "deepseek v3": DEEPSEEK_V3}
# In float32 no rounding decides who computes. On a CPU vLLM 0.32 gets latent attention wrong where several prompts are
# in a batch, quantized or not, so they come one by one; and its AMX kernels for that take no float32. Models without
# latent attention do not use the backend that is named here.
ARGUMENTS = {"dtype": "float32", "max_num_seqs": 1, "attention_backend": "CPU_MLA"}


def assert_serves_experts(held, mixture, expected):
    """Exactly these codes and scales of all experts, and nothing else."""
    at = f"{mixture}.experts.routed_experts."
    found = {name.removeprefix(at): tensor for name, tensor in held.items() if name.startswith(at)}
    tensors = {}
    for weight, q in expected.items():
        tensors[f"{weight}_weight"] = q.codes
        tensors[f"{weight}_weight_scale"] = q.block_scales
        tensors[f"{weight}_weight_global_scale"] = q.global_scale[:, None]
    assert found.keys() == tensors.keys()
    weights = EXPERTS * 3 * INNER * HIDDEN
    assert sum(tensor.nbytes for tensor in found.values()) == weights * 4.5 / 8 + EXPERTS * 2 * 4
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def take_the_dense_shortcut() -> None:
    """As vLLM does on Hopper where this projection has the sizes of DeepSeek-V3."""
    from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear as Projection

    make = Projection.__init__

    def make_with_shortcut(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self._use_min_latency_gemm = True

    Projection.__init__ = make_with_shortcut


@pytest.mark.parametrize("name", MODELS)
def test_model_is_that_of_its_dequantized_checkpoint(engines, tmp_path, name):
    config = MODELS[name]
    checkpoint = write_moe(tmp_path / "checkpoint", config)
    expected = quantize_checkpoint(checkpoint, torch.float32)
    # Which must not be taken: the weight that it reads is quantized.
    before = take_the_dense_shortcut if name == "deepseek v3" else None
    ours = engines.start(checkpoint, before=before, **ARGUMENTS)
    experts = {layer for layer in expected if ".experts." in layer}
    assert served_layers(ours) == set(expected) - experts
    for layer in expected.keys() - experts:
        assert_serves(tensors_of(ours), layer, expected[layer])
    for mixture in mixture_layers(config):
        assert_serves_experts(tensors_of(ours), mixture, stacked(config, expected, mixture))
    (summary,) = ours.lines("qwantize summary:")
    mixtures = len(mixture_layers(config))
    assert f"{len(expected) - len(experts) + mixtures} layers quantized" in summary
    theirs = engines.start_dequantized(checkpoint, expected, ours, **ARGUMENTS)
    assert_agree(ours, theirs, 1e-4)


def test_half_precision(engines, tmp_path):
    checkpoint = write_moe(tmp_path / "checkpoint", QWEN3)
    ours = engines.start(checkpoint)
    expected = quantize_checkpoint(checkpoint)
    for mixture in mixture_layers(QWEN3):
        assert_serves_experts(tensors_of(ours), mixture, stacked(QWEN3, expected, mixture))
    theirs = engines.start_dequantized(checkpoint, expected, ours)
    pairs = zip(ours.result["own_scores"], theirs.result["scores"], strict=True)
    differences = [abs(a - b) for ours_scores, scores in pairs for a, b in zip(ours_scores, scores, strict=True)]
    # Where two experts are nearly even, the rounding of bfloat16 decides, and a score may be off by 0.13.
    assert statistics.median(differences) < 0.05


def overrides(**settings):
    return {"hf_overrides": {"quantization_config": {"quant_method": "qwantize", **settings}}}


def test_one_expert_that_is_ignored_keeps_all_of_its_layer(engines, tmp_path):
    checkpoint = write_moe(tmp_path / "checkpoint", QWEN3)
    first, second = mixture_layers(QWEN3)
    ignore = [f"{first}.experts.1.up_proj", f"{second}.experts"]
    ours = engines.start(checkpoint, **overrides(ignore=ignore), **ARGUMENTS)
    assert not [name for name in tensors_of(ours) if "experts" in name and "global_scale" in name]
    (warning,) = ours.lines("qwantize: ignore names")
    assert f"{first}.experts.1.up_proj but not every member of {first}.experts (" in warning
    assert "and 9 more" in warning
    expected = quantize_checkpoint(checkpoint, torch.float32)
    expected = {layer: q for layer, q in expected.items() if ".experts." not in layer}
    theirs = engines.start_dequantized(checkpoint, expected, ours, **ARGUMENTS)
    assert_agree(ours, theirs, 1e-4)


def assert_ranks_hold_experts(mixture, one, ranks, expert_parallel):
    """What two ranks hold of all experts is what one rank alone does."""
    at = f"{mixture}.experts.routed_experts"
    for weight, part in itertools.product(("w13", "w2"), ("", "_scale", "_global_scale")):
        name = f"{at}.{weight}_weight{part}"
        whole, first, second = (held[name].view(torch.uint8) for held in (one, *ranks))
        if expert_parallel:
            assert torch.equal(torch.cat([first, second]), whole), name
        elif part == "_global_scale":
            assert torch.equal(first, whole), name
            assert torch.equal(second, whole), name
        elif weight == "w2":
            assert torch.equal(torch.cat([first, second], dim=2), whole), name
        else:
            halves = [half for pair in zip(first.chunk(2, 1), second.chunk(2, 1), strict=True) for half in pair]
            assert torch.equal(torch.cat(halves, dim=1), whole), name


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    "expert_parallel",
    [pytest.param(False, id="tensor parallel", marks=pytest.mark.slow), pytest.param(True, id="expert parallel")],
)
def test_two_ranks_hold_the_codes_of_one(engines, tmp_path, expert_parallel):
    """Of every expert its halves of gate and up, row by row, and of down, column by column; or half of the experts."""
    checkpoint = write_moe(tmp_path / "checkpoint", MIXTRAL)
    one = engines.start(checkpoint, **ARGUMENTS)
    use = functools.partial(probe, prompts=TINY_PROMPTS, sequences=sequences_of(one))
    two = engines.start(checkpoint, use, **ARGUMENTS, **TWO_RANKS, enable_expert_parallel=expert_parallel)
    ranks = [tensors_of(two, rank) for rank in range(2)]
    for mixture in mixture_layers(MIXTRAL):
        assert_ranks_hold_experts(mixture, tensors_of(one), ranks, expert_parallel)
    assert_scores_agree(one.result["own_scores"], two.result["scores"], 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiled_graph_holds_one_op_for_all_experts_of_a_layer(engines, tmp_path):
    checkpoint = write_moe(tmp_path / "checkpoint", QWEN3)
    eager = engines.start(checkpoint, **ARGUMENTS)
    use = functools.partial(probe, prompts=TINY_PROMPTS, sequences=sequences_of(eager))
    cache = {"VLLM_CACHE_ROOT": str(tmp_path)}
    compiled = engines.start(checkpoint, use, **ARGUMENTS, enforce_eager=False, env=cache)
    generated = [file.read_text() for file in tmp_path.rglob("inductor_cache/**/*.py")]
    (model,) = [code for code in generated if "qwantize" in code]
    assert model.count("= torch.ops.qwantize.experts.default(") == len(mixture_layers(QWEN3))
    assert_scores_agree(eager.result["own_scores"], compiled.result["scores"], 1e-4)


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_reloaded_experts_are_those_of_a_fresh_start(engines, tmp_path, name):
    config = MODELS[name]
    checkpoint = write_moe(tmp_path / "checkpoint", config)
    other = write_moe(tmp_path / "other", config, seed=1)
    use = functools.partial(reload_twice, other=str(other))
    first, same, changed = engines.start(checkpoint, use, **ARGUMENTS).result
    fresh = engines.start(other, **ARGUMENTS).result
    for states, now in ((first, checkpoint), (same, checkpoint), (changed, other)):
        expected = quantize_checkpoint(now, torch.float32)
        for mixture in mixture_layers(config):
            assert_serves_experts(states["models"][0]["tensors"], mixture, stacked(config, expected, mixture))
    assert same["own_scores"] == first["own_scores"]
    assert changed["own_scores"] == fresh["own_scores"] != first["own_scores"]
    assert first["addresses"] == same["addresses"] == changed["addresses"]


@pytest.mark.slow
def test_experts_are_calibrated_on_what_is_routed_to_them_and_served_with_it(engines, tmp_path):
    """With one expert a token, of weight 1, all experts together see what the shared ones see."""
    config = {**DEEPSEEK, "num_experts_per_tok": 1, "norm_topk_prob": True}
    checkpoint = write_moe(tmp_path / "checkpoint", config)
    write_byte_tokenizer(checkpoint)
    text, path = tmp_path / "text.txt", tmp_path / "hessians.safetensors"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    qwantize("calibrate", checkpoint, "--text", text, "--num-tokens", "256", "--seq-len", "64", "--out", path)

    file, (mixture,) = HessianFile(path), mixture_layers(config)
    shared = file.read_all(f"{mixture}.shared_experts.gate_up_proj")
    names = [f"{mixture}.experts.{expert}" for expert in range(EXPERTS)]
    each = file.read_each([f"{name}.w13" for name in names], 0, HIDDEN // 16)
    assert torch.allclose(each.sum(0), shared, rtol=1e-4, atol=1e-4 * float(shared.abs().max()))
    assert (each.diagonal(dim1=2, dim2=3).sum((1, 2)) > 0).all()
    assert f"{mixture}.gate" not in file.names

    settings = {"scale_search": "hessian", "hessian": str(path), "strict": True}
    ours = engines.start(checkpoint, **overrides(**settings), **ARGUMENTS, skip_tokenizer_init=True)
    hessians = {name: file.read_all(name) for name in file.names if ".experts." not in name}
    for expert, name in enumerate(names):
        hessians[f"{mixture}.experts.{expert}.gate_up_proj"] = file.read_all(f"{name}.w13")
        hessians[f"{mixture}.experts.{expert}.down_proj"] = file.read_all(f"{name}.w2")
    expected = quantize_checkpoint(checkpoint, torch.float32, hessians=hessians, scale_search="hessian")
    assert_serves_experts(tensors_of(ours), mixture, stacked(config, expected, mixture))
