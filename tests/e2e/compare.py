"""Assertions that several tests share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qwantize_vllm import Nvfp4Tensor

from .engine import Outcome


def tensors_of(outcome: Outcome, rank: int = 0) -> dict[str, torch.Tensor]:
    return outcome.result["models"][rank]["tensors"]


def settings_of(outcome: Outcome) -> dict[str, Any]:
    return outcome.result["models"][0]["settings"]


def served_layers(outcome: Outcome) -> set[str]:
    """Names of the layers that hold NVFP4."""
    return {name.removesuffix(".weight_scale") for name in tensors_of(outcome) if name.endswith(".weight_scale")}


def assert_serves(tensors: Mapping[str, torch.Tensor], layer: str, expected: Nvfp4Tensor) -> None:
    """The layer holds exactly these codes and scales, in the dtypes and layouts of NVFP4, and nothing dense."""
    held = {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
    held.pop("bias", None)
    n, k = expected.shape
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
    assert described == {
        "weight": (torch.uint8, (n, k // 2)),
        "weight_scale": (torch.float8_e4m3fn, (n, k // expected.block_size)),
        "weight_global_scale": (torch.float32, ()),
    }, layer
    assert torch.equal(held["weight_global_scale"], expected.global_scale), layer
    assert torch.equal(held["weight_scale"].view(torch.uint8), expected.block_scales.view(torch.uint8)), layer
    assert torch.equal(held["weight"], expected.codes), layer


def assert_scores_agree(a: list[list[float]], b: list[list[float]], tolerance: float) -> None:
    """Two lists of log-probabilities of the same sequences; names every token where they do not agree."""
    assert [len(scores) for scores in a] == [len(scores) for scores in b]
    apart = [
        f"sequence {sequence}, token {token}: {x} and {y}"
        for sequence, pairs in enumerate(map(zip, a, b))
        for token, (x, y) in enumerate(pairs, 1)
        if not abs(x - y) <= tolerance
    ]
    assert not apart, f"{len(apart)} of {sum(map(len, a))} differ by more than {tolerance}:\n" + "\n".join(apart)


def token_ids(outcome: Outcome) -> list[list[int]]:
    """What was generated, for each prompt."""
    return [completion["ids"] for completion in outcome.result["completions"]]


def sequences_of(outcome: Outcome) -> list[list[int]]:
    """Prompt and completion, for each prompt: those whose scores are `own_scores`."""
    return [completion["prompt_ids"] + completion["ids"] for completion in outcome.result["completions"]]


def assert_agree(ours: Outcome, theirs: Outcome, tolerance: float) -> None:
    """`theirs` scored `sequences_of(ours)`; both give the same tokens and first tokens the same probabilities."""
    assert_scores_agree(ours.result["own_scores"], theirs.result["scores"], tolerance)
    for ours_first, theirs_first in zip(_first_steps(ours), _first_steps(theirs), strict=True):
        assert_as_likely(ours_first, theirs_first, tolerance)


def assert_as_likely(ours: Mapping[int, float], theirs: Mapping[int, float], tolerance: float) -> None:
    """The 20 most likely tokens of one step, by id, have the same log-probabilities."""
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= 18  # of 20: at the end of the list, ties may split
    assert max(abs(ours[token] - theirs[token]) for token in shared) <= tolerance


def _first_steps(outcome: Outcome) -> list[dict[int, float]]:
    return [completion["logprobs"][0] for completion in outcome.result["completions"]]
