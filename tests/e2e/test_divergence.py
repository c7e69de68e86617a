"""KL divergences of real engines, against those of the full distributions that vLLM itself can be asked for."""

from __future__ import annotations

import functools
import os
from typing import Any
from unittest import mock

import pytest
import torch

from qwantize_vllm.plugin.perplexity import measure

from .engine import server_environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

VOCABULARY = 256
WINDOWS = [[(7 * i * i + 3 * w) % VOCABULARY for i in range(40)] for w in range(3)]


def full_logprobs(llm: Any, windows: list[list[int]]) -> list[torch.Tensor]:
    """(tokens - 1, vocabulary) of each window."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=VOCABULARY, detokenize=False)
    # One at a time, as they are measured.
    outputs = [llm.generate([TokensPrompt(prompt_token_ids=w)], sampling, use_tqdm=False)[0] for w in windows]
    return [
        torch.tensor([[step[token].logprob for token in range(VOCABULARY)] for step in output.prompt_logprobs[1:]])
        for output in outputs
    ]


def test_it_is_that_of_the_full_distributions(engines, tiny):
    settings = {"scale_search": "naive"}
    use = functools.partial(full_logprobs, windows=WINDOWS)
    p = engines.start(tiny, use, quantization=None, max_logprobs=VOCABULARY).result
    q = engines.start(tiny, use, max_logprobs=VOCABULARY, additional_config={"qwantize": settings}).result
    options = {"enforce_eager": True, "skip_tokenizer_init": True}
    with mock.patch.dict(os.environ, server_environment({"TORCHDYNAMO_DISABLE": "1"}), clear=True):
        scores = measure(str(tiny), WINDOWS, {"bf16": None, "naive": settings}, options)
    kl = [(a.exp() * (a - b)).sum(-1).mean().item() for a, b in zip(p, q, strict=True)]
    agreement = [(a.argmax(-1) == b.argmax(-1)).float().mean().item() for a, b in zip(p, q, strict=True)]
    assert scores["naive"].window_kl == pytest.approx(kl, rel=1e-3)
    assert scores["naive"].window_agreement == pytest.approx(agreement, abs=0.03)  # bfloat16 logits tie
    assert scores["bf16"].window_kl is None
    assert min(kl) > 1e-3
