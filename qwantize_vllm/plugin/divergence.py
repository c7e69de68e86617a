"""KL divergence of next-token distributions: what an engine serves against what the unquantized model does.

At every position of a window but the last, over the whole vocabulary and in nats,

    KL(p || q) = sum over v of p(v) (log p(v) - log q(v)),

p the unquantized model's distribution and q that of the engine measured. Either is the softmax, in float32, of the
logits that the model's `compute_logits` gives in vLLM: what the engine samples from at temperature 1, the rounding of
its head's product to bfloat16 included. Nothing is cut off, and there is no bound for a tail.

p is not kept as logits (200 kB a token for 50,000 words) but as the last hidden states, one file a window, of which the
head of the engine measured makes the logits again, a few rows at a time. So the head must be the same in both engines;
qwantize leaves heads as they are, and `check` would notice where one is not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Logits made at once, of each of the two distributions: bounds the memory.
_CHUNK_LOGITS = 2**23
_KEY = "hidden"
# What the mean of a window may be off, in nats: bfloat16 logits round otherwise where rows are multiplied in other
# numbers at once. Another head, or states of other positions, are off by whole nats.
_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Means over the predictions of one window.

    Attributes:
        kl: KL(p || q), nats.
        agreement: how often p and q have the same most likely token.
        nll, reference_nll: negative log-likelihood of the text under q and p, nats.
    """

    kl: float
    agreement: float
    nll: float
    reference_nll: float

    def check(self, nll: float, reference_nll: float) -> None:
        """nll, reference_nll: what the two engines themselves said of the window.

        Raises:
            RuntimeError: they differ from what was found here.
        """
        for name, found, said in (
            ("this engine's", self.nll, nll),
            ("the unquantized model's", self.reference_nll, reference_nll),
        ):
            if not abs(found - said) <= _TOLERANCE:
                raise RuntimeError(
                    f"{name} hidden states give {found:.4f} nats a token, vLLM's log-probabilities {said:.4f}: the "
                    "head is not the same in both engines, or the model ends in something else than hidden states. "
                    "Divergences would be wrong; use --no-kl"
                )


class DivergenceWorker:
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    model_runner: Any
    rank: int

    def qwantize_watch(self) -> None:
        """Keep what the model gives out from now on, until it is asked for."""
        self._qwantize_outputs: list[Any] = []
        outputs = self._qwantize_outputs
        self.model_runner.get_model().register_forward_hook(lambda module, inputs, output: outputs.append(output))

    def qwantize_keep(self, path: str, tokens: int) -> None:
        """Write the hidden states of the window of so many tokens that has just been read."""
        hidden = self._qwantize_hidden(tokens)
        if self.rank == 0:
            save_file({_KEY: hidden.cpu().contiguous()}, path)

    def qwantize_compare(self, path: str, window: list[int]) -> tuple[float, ...] | None:
        """The fields of the Divergence of the window that has just been read; None on ranks that get no logits."""
        hidden = self._qwantize_hidden(len(window))
        reference = load_file(path)[_KEY].to(hidden.device)
        with torch.inference_mode():
            vocabulary = self.model_runner.model_config.get_vocab_size()
            found = diverge(self.model_runner.get_model().compute_logits, vocabulary, reference, hidden, window)
        return None if found is None else dataclasses.astuple(found)

    def _qwantize_hidden(self, tokens: int) -> torch.Tensor:
        """(tokens - 1, hidden size): one state for each prediction."""
        outputs, self._qwantize_outputs[:] = list(self._qwantize_outputs), []
        for output in outputs:
            if not isinstance(output, torch.Tensor):
                raise TypeError(f"the model gives out {type(output).__name__}, not hidden states; use --no-kl")
        whole = [output for output in outputs if output.shape[0] >= tokens]
        if len(whole) != 1:
            raise RuntimeError(
                f"a window of {tokens} tokens was read in {len(outputs)} steps of "
                f"{[output.shape[0] for output in outputs]}, not in one that Python sees; use --eager, or --no-kl"
            )
        return whole[0][: tokens - 1]


def diverge(
    compute_logits: Any, vocabulary: int, reference: torch.Tensor, hidden: torch.Tensor, window: list[int]
) -> Divergence | None:
    """The divergence of one window.

    Args:
        compute_logits: (rows, hidden size) -> (rows, vocabulary), or None on a rank that gets none.
        reference, hidden: (tokens - 1, hidden size), the states of p and q.
        window: its token ids.
    """
    rows = max(1, _CHUNK_LOGITS // vocabulary)
    targets = torch.tensor(window[1:], device=hidden.device)
    sums = []
    for states, reference_states, target in zip(
        hidden.split(rows), reference.split(rows), targets.split(rows), strict=True
    ):
        logits, reference_logits = compute_logits(states), compute_logits(reference_states)
        if logits is not None:
            sums.append(_sums(reference_logits, logits, target))
    return Divergence(*(torch.stack(sums).sum(0) / len(targets)).tolist()) if sums else None


def _sums(reference_logits: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """float64 (4,): the sums over rows of what `Divergence` has the means of."""
    p, q = (each.float().log_softmax(-1) for each in (reference_logits, logits))
    # A word that p rules out adds nothing, whatever q makes of it.
    kl = (p.exp() * (p - q)).masked_fill_(p == -torch.inf, 0).sum(-1)
    agree = p.argmax(-1) == q.argmax(-1)
    nll, reference_nll = (-each.gather(-1, target[:, None]) for each in (q, p))
    return torch.stack([each.double().sum() for each in (kl, agree, nll, reference_nll)])
