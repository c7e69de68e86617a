"""How fast an engine serves a model of a given shape; the weights are random, which speed does not depend on, but that
tokens spread over experts more evenly than in a trained mixture."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from qwantize_vllm.plugin.engine_process import engine, in_own_process

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "qwen3-30b-a3b": _LLAMA
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "smollm2-135m": _LLAMA
    | {
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    },
}


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests sent at once: how many, tokens of each prompt, tokens generated for each."""

    requests: int
    prompt_tokens: int
    new_tokens: int


def measure(config: dict[str, Any], directory: Path, loads: list[Load], options: dict[str, Any]) -> list[float]:
    """Median seconds of three runs of each load, in an engine of its own process.

    config: the model's. directory: receives it. options: further arguments of `vllm.LLM`.
    """
    (directory / "config.json").write_text(json.dumps(config))
    return in_own_process(_measure, str(directory), loads, options)


def _measure(model: str, loads: list[Load], options: dict[str, Any]) -> list[float]:
    random_weights = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False}
    seconds = []
    with engine(model=model, **random_weights, **options) as llm:
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        for load in loads:
            run_load(llm, load, vocabulary)  # warms up
            seconds.append(statistics.median(run_load(llm, load, vocabulary) for _ in range(3)))
    return seconds


def run_load(llm: Any, load: Load, vocabulary: int) -> float:
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [random.randrange(vocabulary) for _ in range(load.prompt_tokens)]}
        for _ in range(load.requests)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=load.new_tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - began
