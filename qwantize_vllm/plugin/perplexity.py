"""How well the engine that serves predicts a text: perplexity, by vLLM's prompt log-probabilities, and divergence."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwantize_vllm.plugin import divergence
from qwantize_vllm.plugin.corpus import check_context
from qwantize_vllm.plugin.divergence import Divergence
from qwantize_vllm.plugin.engine_process import engine, in_own_process


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of a token stream, each scored alone: no token is added, the first of a window is not predicted.

    Attributes:
        first_token: where the first window begins.
        length: tokens a window; length - 1 predictions.
        count: how many, one after the other; 0 for as many as the text has.
    """

    first_token: int
    length: int
    count: int

    def cut(self, tokens: Sequence[int]) -> list[list[int]]:
        """The windows as lists of token ids.

        Raises:
            ValueError: the text is too short.
        """
        if self.length < 2 or self.count < 0 or self.first_token < 0:
            raise ValueError(f"windows need at least 2 tokens each and numbers from 0 on, got {self}")
        count = self.count or max(1, (len(tokens) - self.first_token) // self.length)
        end = self.first_token + self.length * count
        if end > len(tokens):
            raise ValueError(f"the text has {len(tokens)} tokens; {self} ends at {end}")
        return [list(tokens[i : i + self.length]) for i in range(self.first_token, end, self.length)]


@dataclasses.dataclass(frozen=True)
class Score:
    """What was measured, window by window.

    Attributes:
        window_nll: mean negative log-likelihoods, nats a token, by vLLM's own prompt log-probabilities.
        window_kl: mean KL divergences from the unquantized model, nats a token; None where they were not measured.
        window_agreement: how often its most likely token is that of the unquantized model; None likewise.
    """

    window_nll: list[float]
    window_kl: list[float] | None = None
    window_agreement: list[float] | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.window_nll))

    def log_ratio(self, base: Score) -> tuple[float, float]:
        """(mean, standard error) over windows of the NLL minus that of base: the log of the perplexities' ratio."""
        return mean_and_error([a - b for a, b in zip(self.window_nll, base.window_nll, strict=True)])

    @property
    def kl(self) -> tuple[float, float] | None:
        """(mean, standard error) over windows."""
        return None if self.window_kl is None else mean_and_error(self.window_kl)

    @property
    def agreement(self) -> tuple[float, float] | None:
        """(mean, standard error) over windows."""
        return None if self.window_agreement is None else mean_and_error(self.window_agreement)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; NaN for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread / math.sqrt(len(values))


def tokenize(model: str, text: Path) -> list[int]:
    """Token ids of a text file by the model's tokenizer, no special token added."""
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(model).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)


def measure(
    model: str,
    windows: list[list[int]],
    settings: Mapping[str, dict[str, Any] | None],
    options: dict[str, Any],
    kl: bool = True,
) -> dict[str, Score]:
    """Score windows under each of the settings, in engines that follow one another in processes of their own.

    Args:
        settings: of the plugin, by name; the first one None, the model as it is, which the others are compared with.
        options: further arguments of `vllm.LLM`.
        kl: measure KL divergences too, see `divergence`. Meanwhile a temporary directory holds the last hidden
            states of the unquantized model for every token.

    Raises:
        RuntimeError: the divergences cannot be measured on this model, or with these options.
    """
    if next(iter(settings.values())) is not None:
        raise ValueError("the first setting must be the model as it is")
    scores: dict[str, Score] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, values in settings.items():
            base = next(iter(scores.values()), None)
            states = Path(directory) if kl and len(settings) > 1 else None
            scores[name] = in_own_process(_measure, model, windows, values, options, states, base)
    return scores


def _measure(
    model: str,
    windows: list[list[int]],
    settings: dict[str, Any] | None,
    options: dict[str, Any],
    states: Path | None,
    base: Score | None,
) -> Score:
    """base: of the unquantized model, whose states are in the directory; None where this is the one to write them."""
    from vllm.engine.arg_utils import EngineArgs

    longest = len(windows[0]) + 1
    if base is None:
        check_context(EngineArgs(model=model, **options).create_model_config(), longest)
    arguments = {
        "max_model_len": longest,
        "max_num_batched_tokens": longest,  # a window is read in one step
        "enable_prefix_caching": False,
        **({} if settings is None else {"quantization": "qwantize", "additional_config": {"qwantize": settings}}),
        **({} if states is None else {"worker_extension_cls": f"{divergence.__name__}.DivergenceWorker"}),
        **options,
    }
    nll: list[float] = []
    divergences: list[Divergence] = []
    with engine(model=model, **arguments) as llm:
        if states is not None:
            llm.collective_rpc("qwantize_watch")
        for i, window in enumerate(tqdm(windows, unit="window", disable=None)):
            nll.append(_window_nll(llm, window))
            if states is None:
                continue
            path = str(states / f"{i}.safetensors")
            if base is None:
                llm.collective_rpc("qwantize_keep", args=(path, len(window)))
            else:
                divergences.append(_diverge(llm, path, window))
                divergences[-1].check(nll[-1], base.window_nll[i])
    if base is None or states is None:
        return Score(nll)
    return Score(nll, [each.kl for each in divergences], [each.agreement for each in divergences])


def _diverge(llm: Any, path: str, window: list[int]) -> Divergence:
    found = llm.collective_rpc("qwantize_compare", args=(path, window))
    return Divergence(*next(each for each in found if each is not None))


def _window_nll(llm: Any, window: list[int]) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": window}], sampling, use_tqdm=False)
    return _mean_nll(window, output.prompt_logprobs)


def _mean_nll(window: list[int], logprobs: list[Any]) -> float:
    # Entry i holds the log-probability of token i given those before it; the first has none.
    predictions = zip(window[1:], logprobs[1:], strict=True)
    return -statistics.fmean(entry[token].logprob for token, entry in predictions)
