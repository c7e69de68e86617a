"""Multi-token prediction: a draft layer that comes with the model is quantized as the model is, and changes no answer.

On GLM-4.5 as vLLM reads it: the draft layer is a mixture of experts, one number behind the model's last layer.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import quantize_checkpoint
from .compare import assert_scores_agree, assert_serves, token_ids
from .conftest import TINY_PROMPTS, Engines
from .engine import Outcome, in_forked_process
from .moe_checkpoints import DRAFT, GLM4, LAYERS, stacked, write_glm
from .probe import describe_model, metrics_of, probe
from .test_export import export_each
from .test_moe import assert_serves_experts

pytestmark = pytest.mark.e2e

ARGUMENTS = {"dtype": "float32", "disable_log_stats": False}
SPECULATE = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
TOKENS = 24


def describe_draft(worker: Any) -> dict[str, Any]:
    return describe_model(worker.model_runner.drafter.model)


def probe_both(llm: Any) -> dict[str, Any]:
    """As `probe`; and of the draft model what it holds, and how often it was asked."""
    result = probe(llm, TINY_PROMPTS, max_tokens=TOKENS)
    drafts = metrics_of(llm)["vllm:spec_decode_num_drafts"]
    (draft,) = llm.collective_rpc(describe_draft)
    return {**result, "draft": draft["tensors"], "drafts": drafts}


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glm(tmp_path_factory.mktemp("multi_token") / "glm")


@pytest.fixture(scope="module")
def plain(engines: Engines, glm: Path) -> Outcome:
    """The model without its draft layer."""
    return engines.start(glm, functools.partial(probe, prompts=TINY_PROMPTS, max_tokens=TOKENS), **ARGUMENTS)


def assert_answers_alike(speculating: Outcome, plain: Outcome) -> None:
    assert speculating.result["drafts"] > 0
    assert token_ids(speculating) == token_ids(plain)
    assert_scores_agree(speculating.result["own_scores"], plain.result["own_scores"], 1e-4)


def test_the_draft_layer_is_quantized_and_reported(engines, glm, plain):
    ours = engines.start(glm, probe_both, **ARGUMENTS, **SPECULATE)
    assert_answers_alike(ours, plain)
    of_model, of_draft = ours.lines("qwantize summary:")
    assert f"{LAYERS * 4 + 1} layers quantized" in of_model  # attention's two, two of a dense or shared block; experts
    assert "5 layers quantized" in of_draft

    expected = quantize_checkpoint(glm, torch.float32)
    held = {name.replace(".mtp_block.", "."): tensor for name, tensor in ours.result["draft"].items()}
    held.pop(f"{DRAFT}.mlp.experts.routed_experts.e_score_correction_bias")  # the router's, dense
    for layer in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_experts.gate_up_proj"):
        assert_serves(held, f"{DRAFT}.{layer}", expected[f"{DRAFT}.{layer}"])
    assert_serves_experts(held, f"{DRAFT}.mlp", stacked(GLM4, expected, f"{DRAFT}.mlp"))


def test_an_export_is_served_with_its_draft_layer_as_it_was(engines, glm, plain, tmp_path):
    out = tmp_path / "export"
    (done,) = in_forked_process(export_each, [(str(glm), out, {}, "compressed-tensors", "float32", 2**30)])
    assert f"{LAYERS - 1}.mlp.experts" in " ".join(done.quantized)
    ours = engines.start(out, probe_both, quantization="qwantize", **ARGUMENTS, **SPECULATE)
    assert_answers_alike(ours, plain)
    assert not [name for name in ours.result["draft"] if name.endswith("weight_scale")]
