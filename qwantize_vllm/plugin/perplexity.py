"""Perplexity through vLLM itself: the engine that serves scores the text with its own prompt log-probabilities."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwantize_vllm.plugin.engine_process import engine, in_own_process


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of a token stream, each scored alone: no token is added, the first of a window is not predicted.

    Attributes:
        first_token: where the first window begins.
        length: tokens a window; length - 1 predictions.
        count: how many, one after the other.
    """

    first_token: int
    length: int
    count: int

    def cut(self, tokens: Sequence[int]) -> list[list[int]]:
        """The windows as lists of token ids.

        Raises:
            ValueError: the text is too short.
        """
        end = self.first_token + self.length * self.count
        if self.length < 2 or self.count < 1 or self.first_token < 0:
            raise ValueError(f"windows need at least 2 tokens each, one window and a start from 0 on, got {self}")
        if end > len(tokens):
            raise ValueError(f"the text has {len(tokens)} tokens; {self} ends at {end}")
        return [list(tokens[i : i + self.length]) for i in range(self.first_token, end, self.length)]


@dataclasses.dataclass(frozen=True)
class Score:
    """Mean negative log-likelihoods (nats a token) of every window."""

    window_nll: list[float]

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.window_nll))

    def log_ratio(self, base: Score) -> tuple[float, float]:
        """(mean, standard error) over windows of the NLL minus that of base: the log of the perplexities' ratio."""
        differences = [a - b for a, b in zip(self.window_nll, base.window_nll, strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
        return statistics.fmean(differences), spread / math.sqrt(len(differences))


def tokenize(model: str, text: Path) -> list[int]:
    """Token ids of a text file by the model's tokenizer, no special token added."""
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(model).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)


def measure(model: str, windows: list[list[int]], settings: dict[str, Any] | None, options: dict[str, Any]) -> Score:
    """Score windows in an engine of its own process, gone when this returns.

    settings: of the plugin, or None for the model as it is. options: further arguments of `vllm.LLM`.
    """
    return in_own_process(_measure, model, windows, settings, options)


def _measure(model: str, windows: list[list[int]], settings: dict[str, Any] | None, options: dict[str, Any]) -> Score:
    from vllm import SamplingParams

    quantized = {} if settings is None else {"quantization": "qwantize", "additional_config": {"qwantize": settings}}
    arguments = {"max_model_len": len(windows[0]) + 1, "enable_prefix_caching": False, **quantized, **options}
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    with engine(model=model, **arguments) as llm:
        outputs = llm.generate([{"prompt_token_ids": window} for window in windows], sampling)
    return Score([_window_nll(window, output.prompt_logprobs) for window, output in zip(windows, outputs, strict=True)])


def _window_nll(window: list[int], logprobs: list[Any]) -> float:
    # Entry i holds the log-probability of token i given those before it; the first has none.
    predictions = zip(window[1:], logprobs[1:], strict=True)
    return -statistics.fmean(entry[token].logprob for token, entry in predictions)
