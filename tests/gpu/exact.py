"""How far an engine's completions are from a float32 model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Exact:
    """A checkpoint in float32 on the CPU, which completions of `tests.e2e.probe.generate` are held against."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForCausalLM

        # "eager": grouped products in float32 are not in every version of PyTorch for CPUs
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, experts_implementation="eager"
        )

    def distance(self, completions: list[dict[str, Any]]) -> float:
        """Root mean square of what the likeliest tokens' log-probabilities are apart."""
        return self.apart(completions).square().mean().sqrt().item()

    def apart(self, completions: list[dict[str, Any]]) -> torch.Tensor:
        """By how much each of the likeliest tokens' log-probabilities is above the exact one."""
        apart = []
        for each, exact in self._steps(completions):
            apart += [
                mine - exact[step, token] for step, of in enumerate(each["logprobs"]) for token, mine in of.items()
            ]
        assert len(apart) >= 20 * sum(len(each["ids"]) for each in completions)
        return torch.stack(apart)

    def shortfall(self, completions: list[dict[str, Any]]) -> float:
        """How much less likely than the likeliest token a chosen one was at most, in log-probability."""
        behind = [
            exact.max(-1).values - exact.gather(-1, torch.tensor(each["ids"])[:, None])[:, 0]
            for each, exact in self._steps(completions)
        ]
        return torch.cat(behind).max().item()

    def _steps(self, completions: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """With each completion the log-probabilities (steps, vocabulary) of the tokens that it generated."""
        for each in completions:
            with torch.no_grad():
                logits = self._model(torch.tensor([each["prompt_ids"] + each["ids"]])).logits[0]
            yield each, logits[len(each["prompt_ids"]) - 1 : -1].log_softmax(-1)
