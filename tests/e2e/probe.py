"""What the tests ask of an engine, inside its process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Prompt = str | list[int]


def probe(
    llm: Any, prompts: Sequence[Prompt] = (), sequences: Sequence[Sequence[int]] = (), max_tokens: int = 8
) -> dict[str, Any]:
    """Everything that most tests want to know of an engine.

    Returns:
        completions: of `prompts`, greedy: prompt_ids, ids, text (None without a tokenizer), logprobs: one
            {token id: log-probability} a generated token, of the most likely ones.
        scores: of `sequences` and of the completions' own ids, the log-probability of every token but the first.
        models: one for each rank, as `describe_model`.
    """
    completions = generate(llm, prompts, max_tokens)
    own = [each["prompt_ids"] + each["ids"] for each in completions]
    scores = score(llm, [*map(list, sequences), *own])
    models = llm.apply_model(describe_model)
    return {
        "completions": completions,
        "scores": scores[: len(sequences)],
        "own_scores": scores[len(sequences) :],
        "models": models,
    }


def generate(llm: Any, prompts: Sequence[Prompt], max_tokens: int) -> list[dict[str, Any]]:
    outputs = llm.generate(_prompts(prompts), _parameters(llm, max_tokens=max_tokens, logprobs=20), use_tqdm=False)
    return [
        {
            "prompt_ids": list(output.prompt_token_ids),
            "ids": list(output.outputs[0].token_ids),
            "text": output.outputs[0].text,
            "logprobs": [{i: entry.logprob for i, entry in step.items()} for step in output.outputs[0].logprobs],
        }
        for output in outputs
    ]


def score(llm: Any, sequences: Sequence[list[int]]) -> list[list[float]]:
    """Log-probability of every token but the first, given those before it."""
    outputs = llm.generate(_prompts(sequences), _parameters(llm, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return [
        [step[i].logprob for i, step in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)]
        for output in outputs
    ]


def metrics_of(llm: Any) -> dict[str, Any]:
    """vLLM's counters by name; None for what is not one number. Needs disable_log_stats=False."""
    return {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """tensors: what modules hold, by the module's name and its own, but the KV cache; settings: of qwantize."""
    tensors = {}
    for prefix, module in model.named_modules():
        held = {**module._parameters, **module._buffers, **vars(module)}
        held.pop("kv_cache", None)
        tensors |= {f"{prefix}.{name}": t.detach().cpu().clone() for name, t in held.items() if torch.is_tensor(t)}
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    settings = [method.settings.model_dump(mode="json") for method in methods if hasattr(method, "settings")]
    return {"tensors": tensors, "settings": settings[0] if settings else None}


def _prompts(prompts: Sequence[Prompt]) -> list[Any]:
    from vllm import TokensPrompt

    return [prompt if isinstance(prompt, str) else TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]


def _parameters(llm: Any, **parameters: Any) -> Any:
    from vllm import SamplingParams

    has_tokenizer = not llm.llm_engine.model_config.skip_tokenizer_init
    return SamplingParams(temperature=0, ignore_eos=True, detokenize=has_tokenizer, **parameters)
