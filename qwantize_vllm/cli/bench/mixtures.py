"""The experts of named mixtures: random weights, and tokens that are routed to them at random."""

from __future__ import annotations

import dataclasses

import torch

from qwantize_vllm.cli.bench.inputs import SEED, random_weight
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.experts import SwizzledExperts, swizzle_experts
from qwantize_vllm.search.quantize import quantize_nvfp4

# Routings that take turns, so that few tokens do not meet the experts of the last call in the L2 cache.
_ROUTINGS = 16
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, weights and ids of the experts of each token


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The experts of a layer, and how many of them a token goes through."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


MIXTURES = {
    "mixtral-8x7b": Mixture(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Mixture(128, 8, 2048, 768),
    "tiny": Mixture(8, 2, 256, 128),
}


def random_experts(mixture: Mixture, device: torch.device, ranks: int = 1) -> tuple[Nvfp4Tensor, Nvfp4Tensor]:
    """w13 (E, 2 * intermediate, hidden) and w2 (E, hidden, intermediate), from bfloat16: of all experts, or of those
    that one of several ranks has."""
    shapes = (2 * mixture.intermediate, mixture.hidden), (mixture.hidden, mixture.intermediate)
    w13, w2 = (
        quantize_nvfp4(random_weight((mixture.experts // ranks, *shape), torch.bfloat16, device), "naive")
        for shape in shapes
    )
    return w13, w2


def swizzled_experts(
    w13: Nvfp4Tensor, w2: Nvfp4Tensor, total: int | None = None
) -> tuple[SwizzledExperts, SwizzledExperts]:
    """Both weights as the grouped kernels read them, in memory of their own; total: see `swizzle_experts`."""
    first, second = (
        swizzle_experts(*plain_copy(q), q.block_size, gated=gated, total=total)
        for q, gated in ((w13, True), (w2, False))
    )
    return first, second


def plain_copy(q: Nvfp4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, block scales and global scales (experts, 1), copied: so that each call has weights of its own."""
    return q.codes.clone(), q.block_scales.clone(), q.global_scale[:, None].clone()


def random_inputs(mixture: Mixture, tokens: int, device: torch.device) -> list[Inputs]:
    """Different tokens and routings, the same ones in every run: x bfloat16 (tokens, hidden), float32 weights and int32
    ids (tokens, top_k)."""
    generator = torch.Generator(device).manual_seed(SEED + tokens)
    inputs = []
    for _ in range(_ROUTINGS if tokens <= _ROUTINGS else 2):
        x = torch.randn(tokens, mixture.hidden, generator=generator, device=device)
        logits = torch.randn(tokens, mixture.experts, generator=generator, device=device)
        weights, ids = logits.softmax(-1).topk(mixture.top_k)
        inputs.append((x.bfloat16(), weights / weights.sum(-1, keepdim=True), ids.int()))
    return inputs
