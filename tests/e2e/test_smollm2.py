"""A real checkpoint, quantized while it loads, against the checkpoint that its codes and scales stand for."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from qwantize_vllm import Nvfp4Tensor

from .checkpoints import quantize_checkpoint
from .compare import assert_as_likely, assert_scores_agree, assert_serves, served_layers, tensors_of
from .conftest import Engines
from .engine import Outcome
from .probe import probe

pytestmark = pytest.mark.e2e

PROMPTS = (
    "The capital of France is",
    "Water boils at 100 degrees",
    "1, 2, 3, 4, 5, 6,",
    "Question: What color is the sky?\nAnswer:",
    "Once upon a time, there was a little girl who",
    "<|im_start|>user\nWhat is the largest planet?<|im_end|>\n<|im_start|>assistant\n",
)
TOKENS = 40
# In float32 only the order of sums differs, which has cost up to 6e-5; the closest two first choices are 0.014 apart.
EXACT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> dict[str, Nvfp4Tensor]:
    """What `quantize_nvfp4` makes of the checkpoint."""
    return quantize_checkpoint(smollm2)


@pytest.fixture(scope="module")
def quantized(engines: Engines, smollm2: Path) -> Outcome:
    return engines.start(smollm2, functools.partial(probe, prompts=PROMPTS, max_tokens=TOKENS))


@pytest.fixture(scope="module")
def dequantized(engines: Engines, smollm2: Path, expected: dict[str, Nvfp4Tensor], quantized: Outcome) -> Outcome:
    """Plain vLLM on the dequantized weights: its own completions, and its scores of the quantized engine's."""
    return engines.start_dequantized(smollm2, expected, quantized)


@pytest.fixture(scope="module")
def quantized_float32(engines: Engines, smollm2: Path) -> Outcome:
    return engines.start(smollm2, functools.partial(probe, prompts=PROMPTS, max_tokens=TOKENS), dtype="float32")


@pytest.fixture(scope="module")
def exact(engines: Engines, smollm2: Path, expected: dict[str, Nvfp4Tensor], quantized: Outcome) -> Outcome:
    """Plain vLLM in float32 on the dequantized weights, unrounded: its completions, and scores as `dequantized`."""
    return engines.start_dequantized(smollm2, expected, quantized, "float32")


def test_text_is_sane(quantized):
    texts = [completion["text"] for completion in quantized.result["completions"]]
    for text, continuation in zip(texts, (" Paris", " Celsius", " 7, 8, 9"), strict=False):
        assert text.startswith(continuation)


def test_every_linear_layer_serves_the_codes_of_quantize_nvfp4(quantized, expected):
    assert len(expected) == 4 * 30
    assert served_layers(quantized) == set(expected)
    for layer, q in expected.items():
        assert_serves(tensors_of(quantized), layer, q)


def test_only_embedding_head_and_norms_stay_dense(quantized, expected):
    dense = {
        name: tensor.dtype
        for name, tensor in tensors_of(quantized).items()
        if name.endswith(".weight") and name.removesuffix(".weight") not in expected
    }
    norms = [
        f"model.layers.{i}.{norm}.weight" for i in range(30) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    others = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    assert dense == dict.fromkeys(norms + others, torch.bfloat16)


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_greedy_output_is_that_of_the_dequantized_checkpoint(quantized_float32, exact, prompt):
    """In float32, as bfloat16 logits lie so far apart that near ties split by the order of sums alone."""
    ours, theirs = (outcome.result["completions"][prompt] for outcome in (quantized_float32, exact))
    assert len(ours["ids"]) == TOKENS
    assert ours["ids"] == theirs["ids"]
    for steps in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        assert_as_likely(*steps, EXACT_TOLERANCE)


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_the_same_text_is_as_likely_to_the_dequantized_checkpoint(quantized_float32, exact, prompt):
    """Many tokens at once, in float32."""
    scores = [quantized_float32.result["own_scores"][prompt]], [exact.result["own_scores"][prompt]]
    assert_scores_agree(*scores, EXACT_TOLERANCE)


def test_many_tokens_at_once_are_as_close_to_float32_as_by_dense_bfloat16_layers(quantized, dequantized, exact):
    """The weights have the same bits, but sums are taken in another order, which some CPUs round otherwise."""
    truth, theirs = ([torch.tensor(each) for each in outcome.result["scores"]] for outcome in (exact, dequantized))
    ours = [torch.tensor(each) for each in quantized.result["own_scores"]]
    assert_as_close(ours, theirs, truth)


def test_decoding_is_as_close_to_float32_as_by_dense_bfloat16_layers(quantized, dequantized, exact):
    """The log-probabilities with which tokens were chosen one at a time, so by the kernel for few tokens."""
    ours, theirs, truth = [], [], []
    for prompt, completion in enumerate(quantized.result["completions"]):
        start = len(completion["prompt_ids"]) - 1
        truth.append(torch.tensor(exact.result["scores"][prompt][start:]))
        theirs.append(torch.tensor(dequantized.result["scores"][prompt][start:]))
        chosen = [step[i] for i, step in zip(completion["ids"], completion["logprobs"], strict=True)]
        ours.append(torch.tensor(chosen))
    assert_as_close(ours, theirs, truth)


def assert_as_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """Log-probabilities of two engines in bfloat16, and of one in float32.

    Most of the error of either engine is what bfloat16 activations and logits cost. A kernel that is right
    adds none to it, in fact it spares the rounding of the weights; one that loses a code does.
    """
    errors = (torch.cat(each) - torch.cat(truth) for each in (ours, theirs))
    ours_rms, theirs_rms = (error.square().mean().sqrt().item() for error in errors)
    print(f"rms error of log-probabilities: {ours_rms:.4f}, of dense bfloat16 layers {theirs_rms:.4f}")
    assert ours_rms <= 1.3 * theirs_rms
