"""The experts of a mixture from plain codes, expert after expert: on a CPU, and what the grouped kernel is tested with."""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.backends import Matmul


def experts_one_by_one(
    x: torch.Tensor,
    w13: list[Nvfp4Tensor],
    w2: Nvfp4Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    multiply: Matmul,
) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype, the weighted sum over each token's experts in float32.

    w13: one batched weight (E, 2N', K), gate above up, or gate and up (E, N', K) each. w2: (E, N, N'). topk_ids:
    (M, top_k), negative: not here. multiply: a backend of backends.py.

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
        z = multiply(activate(gate, activation) * up, w2[expert], None)
        y.index_add_(0, token, z.float() * topk_weights[token, choice].float()[:, None])
    return y.to(x.dtype)


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """What up is multiplied by, in gate's dtype; activation: one of ACTIVATIONS of experts.py."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    if activation not in ("gelu", "gelu_tanh"):
        raise ValueError(f"activation must be silu, gelu or gelu_tanh, got {activation!r}")
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
