"""The experts of a mixture, one after the other, from plain codes or whatever else a product takes: on a CPU, and where
their inputs are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwantize_vllm.format import Nvfp4Tensor

# (x (m, K), one expert's weight (N, K), None) -> (m, N).
Multiply = Callable[[torch.Tensor, Any, None], torch.Tensor]
# Told of each expert that has tokens: its number, its inputs, what w2 gets, and the weights of the results.
Observe = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def experts_one_by_one(
    x: torch.Tensor,
    w13: Sequence[Any],
    w2: Any,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    multiply: Multiply,
    observe: Observe | None = None,
) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype, the weighted sum over each token's experts in float32.

    w13: one weight (E, 2N', K), gate above up, or gate and up (E, N', K) each; w2: (E, N, N'); to be indexed by expert.
    topk_ids: (M, top_k), negative: not here. multiply: a backend of backends.py, or what suits the weights.

    The host must know how many tokens each expert has, so no CUDA graph can hold this.
    """
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        if expert < 0:
            continue
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        inputs = x[token]
        parts = [multiply(inputs, weight[expert], None) for weight in w13]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        h, weights = activate(gate, activation) * up, topk_weights[token, choice].float()
        if observe is not None:
            observe(expert, inputs, h, weights)
        y.index_add_(0, token, multiply(h, w2[expert], None).float() * weights[:, None])
    return y.to(x.dtype)


def members_of(
    codes: torch.Tensor, block_scales: torch.Tensor, global_scales: torch.Tensor, block_size: int
) -> list[Nvfp4Tensor]:
    """A batched weight for each of the members that have a global scale, one below the other: (E, rows / members, K).

    codes: (E, rows, K/2). block_scales: (E, rows, K/block_size). global_scales: (E, members).
    """
    members = global_scales.shape[1]
    parts = zip(codes.chunk(members, 1), block_scales.chunk(members, 1), global_scales.unbind(1), strict=True)
    return [Nvfp4Tensor(*part, block_size) for part in parts]


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """What up is multiplied by, in gate's dtype; activation: one of ACTIVATIONS of experts.py."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    if activation not in ("gelu", "gelu_tanh"):
        raise ValueError(f"activation must be silu, gelu or gelu_tanh, got {activation!r}")
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
