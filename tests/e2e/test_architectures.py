"""Architectures that name, fuse and transpose their weights in other ways: ours is vLLM's on dequantized weights.

In float32, where no rounding hides a mistake.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from .architectures import CAUSAL, write_bert, write_blip2, write_causal
from .checkpoints import write_tiny
from .compare import assert_agree, assert_serves, sequences_of, served_layers, tensors_of
from .conftest import TINY_PROMPTS, Engines
from .dequantized import dequantize_on_load, with_quantized
from .engine import Outcome
from .probe import describe_model, probe

pytestmark = pytest.mark.e2e

LINEAR = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
LAYERS = {
    "gpt2": ("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "odd sizes": ("model.layers", ("self_attn.o_proj", "mlp.down_proj")),
}
TOLERANCE = 1e-3  # of a log-probability, or of an element of an embedding; without the plugin's weights it is 0.1 to 3


def _prefix(module: str) -> str:
    """By which vLLM names a layer when it builds it: where that is not the path of the module."""
    module = module.replace(".attention.self.qkv_proj", ".attention.output.qkv_proj")  # of BERT
    return module.removeprefix("vision_model")  # of BLIP-2


def start_dequantized(engines: Engines, checkpoint: Path, ours: Outcome, use: Any, **arguments: Any) -> Outcome:
    """Plain vLLM with the layers that ours quantized dequantized, which are exactly those of ours."""
    module_of = {_prefix(layer): layer for layer in served_layers(ours)}
    before = functools.partial(dequantize_on_load, set(module_of))
    use = functools.partial(with_quantized, use=use)
    theirs = engines.start(checkpoint, use, before=before, quantization=None, dtype="float32", **arguments)
    assert theirs.result["quantized"].keys() == module_of.keys()
    for prefix, q in theirs.result["quantized"].items():
        assert_serves(tensors_of(ours), module_of[prefix], q)
    return theirs


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(engines, tmp_path, name):
    checkpoint = write_causal(name, tmp_path / "checkpoint")
    ours = engines.start(checkpoint, dtype="float32")
    parent, linear = LAYERS.get(name, ("model.layers", LINEAR))
    assert served_layers(ours) == {f"{parent}.{i}.{layer}" for i in range(2) for layer in linear}

    use = functools.partial(probe, prompts=TINY_PROMPTS, sequences=sequences_of(ours))
    theirs = start_dequantized(engines, checkpoint, ours, use)
    assert_agree(ours, theirs, TOLERANCE)


def pool(llm: Any, task: str, part: str) -> dict[str, Any]:
    """A task of pooling models, and what its outputs call their values."""
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in TINY_PROMPTS]
    outputs = getattr(llm, task)(prompts, use_tqdm=False)
    values = torch.tensor([getattr(output.outputs, part) for output in outputs])
    return {"values": values, "models": llm.apply_model(describe_model)}


EMBED = functools.partial(pool, task="embed", part="embedding")
CLASSIFY = functools.partial(pool, task="classify", part="probs")


def difference(ours: Outcome, theirs: Outcome) -> float:
    return (ours.result["values"] - theirs.result["values"]).abs().max().item()


def test_bert(engines, tmp_path):
    checkpoint = write_bert(tmp_path / "checkpoint")
    ours = engines.start(checkpoint, EMBED, dtype="float32", runner="pooling")
    assert len(served_layers(ours)) == 2 * 4
    theirs = start_dequantized(engines, checkpoint, ours, EMBED, runner="pooling")
    assert difference(ours, theirs) <= TOLERANCE
    assert ours.result["values"].norm(dim=1).min() > 0.99


def test_classifier(engines, tmp_path):
    """The layer that gives the scores stays as it is, with its bias, which vLLM adds to it while it loads."""

    def with_scores(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["score.weight"] = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)) / 11
        tensors["score.bias"] = torch.tensor([1.0, -0.5, 0.25])

    labels = {"id2label": {str(i): f"class {i}" for i in range(3)}, "num_labels": 3}
    config = {"architectures": ["LlamaForSequenceClassification"], **labels}
    checkpoint = write_tiny(tmp_path / "checkpoint", with_scores, **config)
    ours = engines.start(checkpoint, CLASSIFY, dtype="float32", runner="pooling")
    assert len(served_layers(ours)) == 2 * 4
    theirs = start_dequantized(engines, checkpoint, ours, CLASSIFY, runner="pooling")
    assert difference(ours, theirs) <= TOLERANCE


def look(llm: Any) -> dict[str, Any]:
    """Log-probabilities of what follows each of two images."""
    from PIL import Image
    from vllm import SamplingParams

    images = [Image.new("RGB", (56, 56), color) for color in ("red", "navy")]
    prompts = [{"prompt": "What is it?", "multi_modal_data": {"image": image}} for image in images]
    parameters = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    seen = [{i: entry.logprob for i, entry in output.outputs[0].logprobs[0].items()} for output in outputs]
    return {"seen": seen, "models": llm.apply_model(describe_model)}


@pytest.mark.parametrize("towers", ["leave", "quantize"])
def test_vision_language(engines, tmp_path, towers):
    checkpoint = write_blip2(tmp_path / "checkpoint")
    arguments = {"max_model_len": 128, "limit_mm_per_prompt": {"image": 1}}
    settings = {} if towers == "leave" else {"additional_config": {"qwantize": {"towers": towers}}}
    ours = engines.start(checkpoint, look, dtype="float32", **settings, **arguments)
    linear = ("self_attn.qkv_proj", "self_attn.out_proj", "fc1", "fc2")
    language = {f"language_model.model.decoder.layers.{i}.{layer}" for i in range(2) for layer in linear}
    tower = served_layers(ours) - language
    assert language <= served_layers(ours)
    assert {name.partition(".")[0] for name in tower} == (set() if towers == "leave" else {"vision_model"})
    (summary,) = ours.lines("qwantize summary:")
    assert ("of vision or audio" in summary) == (towers == "leave")

    theirs = start_dequantized(engines, checkpoint, ours, look, **arguments)
    red, navy = ours.result["seen"]
    assert red != navy  # it looks at them
    for one, other in zip(ours.result["seen"], theirs.result["seen"], strict=True):
        shared = one.keys() & other.keys()
        assert len(shared) >= 18
        assert max(abs(one[token] - other[token]) for token in shared) <= TOLERANCE
