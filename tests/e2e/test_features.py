"""What a production vLLM does beside plain decoding, over quantized layers: the answers do not change.

On tiny models in float32, where greedy decoding takes no chances.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .checkpoints import write_byte_tokenizer, write_tiny
from .compare import assert_scores_agree
from .dequantized import dequantize_on_load
from .probe import metrics_of

pytestmark = pytest.mark.e2e

TOKENS = 40
# Two that begin alike for many KV blocks, and a short one.
BEGINNING = [3 + (i * i) % 200 for i in range(170)]
PROMPTS = [[*BEGINNING, 9, 10, 11], [*BEGINNING, 60, 61], [1, 5, 9, 30]]
DATE = r"20[0-9]{2}-[01][0-9]"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer."""
    checkpoint = write_tiny(tmp_path_factory.mktemp("features") / "reader")
    write_byte_tokenizer(checkpoint)
    return checkpoint


def generate(llm: Any, prompts: Any, lora: Any = None, **parameters: Any) -> list[Any]:
    from vllm import SamplingParams, TokensPrompt

    chosen = SamplingParams(**{"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 1, **parameters})
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return llm.generate(given, chosen, use_tqdm=False, lora_request=lora)


def described(outputs: list[Any]) -> dict[str, Any]:
    """Tokens, their log-probabilities, and how many of the prompt's were in the cache."""
    return {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [step[i].logprob for i, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)]
            for output in outputs
        ],
        "cached": [output.num_cached_tokens for output in outputs],
    }


def one_by_one(llm: Any) -> dict[str, Any]:
    """The prompts one after the other, so that a later one finds an earlier one's blocks."""
    result = described([output for prompt in PROMPTS for output in generate(llm, [prompt])])
    metrics = metrics_of(llm)
    drafted = metrics.get("vllm:spec_decode_num_drafts"), metrics.get("vllm:spec_decode_num_accepted_tokens")
    return {**result, "drafts": drafted[0], "accepted": drafted[1], "dates": dates(llm)}


def dates(llm: Any) -> list[str]:
    """Answers that must have the form of DATE; the model alone would say something else."""
    from vllm.sampling_params import StructuredOutputsParams

    form = StructuredOutputsParams(regex=DATE)
    outputs = generate(llm, PROMPTS, structured_outputs=form, ignore_eos=False)
    return [output.outputs[0].text.replace(" ", "") for output in outputs]  # every byte is a token, shown apart


def test_caching_chunks_and_speculation_change_no_answer(engines, reader):
    """Prefix caching, chunked prefill and n-gram speculation, all at once, against none of them; structured output
    under both."""
    arguments = {"dtype": "float32", "disable_log_stats": False, "max_logprobs": 20}
    plain = engines.start(reader, one_by_one, **arguments, enable_prefix_caching=False, async_scheduling=False)
    features = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 32,  # a prompt of 173 tokens takes six steps
        "max_num_seqs": 4,
        "enable_chunked_prefill": True,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
    }
    all_of_them = engines.start(reader, one_by_one, **arguments, **features)

    one, other = plain.result, all_of_them.result
    assert other["ids"] == one["ids"]
    assert_scores_agree(one["logprobs"], other["logprobs"], 1e-3)
    assert one["cached"] == [0, 0, 0]
    assert other["cached"][1] > 0  # it did find them
    assert one["drafts"] is None
    assert other["drafts"] > 0
    assert other["accepted"] > 0  # it did speculate, and with success
    for each in (one, other):
        assert all(re.fullmatch(DATE, date) for date in each["dates"]), each["dates"]
    assert one["dates"] == other["dates"]


def write_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of rank 8 on every linear layer of the tiny model, as PEFT writes it, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128)}
    sizes = {f"self_attn.{name}_proj": size for name, size in sizes.items()}
    sizes |= {"mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256)}
    tensors = {}
    for layer in range(2):
        for name, (n, k) in sizes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(8, k, generator=generator) / k**0.5
            tensors[f"{at}.lora_B.weight"] = torch.randn(n, 8, generator=generator) / 8**0.5
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": None}
    config["target_modules"] = sorted(name.rpartition(".")[2] for name in sizes)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def with_adapters(llm: Any, folders: list[Path]) -> dict[str, Any]:
    """The same prompt without an adapter and with each, in one batch."""
    from vllm.lora.request import LoRARequest

    requests = [LoRARequest(folder.name, i + 1, str(folder)) for i, folder in enumerate(folders)]
    return described(generate(llm, [PROMPTS[2]] * 3, [None, *requests], max_tokens=8))


def test_several_adapters_at_once(engines, tiny, tmp_path, linear_layers_of_tiny):
    """Each over the quantized weights, as over dequantized ones."""
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]
    use = functools.partial(with_adapters, folders=folders)
    # Room for a third: on a CPU vLLM 0.32.0 gives requests without an adapter the one in the last place.
    arguments = {"dtype": "float32", "enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    ours = engines.start(tiny, use, **arguments)
    before = functools.partial(dequantize_on_load, linear_layers_of_tiny)
    theirs = engines.start(tiny, use, before=before, quantization=None, **arguments)
    none, first, second = ours.result["ids"]
    assert none != first != second != none
    assert ours.result["ids"] == theirs.result["ids"]
    assert_scores_agree(ours.result["logprobs"], theirs.result["logprobs"], 1e-3)


@pytest.fixture
def linear_layers_of_tiny() -> set[str]:
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return {f"model.layers.{i}.{name}" for i in range(2) for name in names}
