"""A product with what stands before it and after it in most models: the RMS norm of a sum, and a gate.

At one or two tokens each of these is a kernel of some 2 us for numbers that would fit into one register a thread; there
the product's kernel does them (gluon_normed.py). With more tokens they are kernels of their own, as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qwantize_vllm.matmul.gpu import capability_major
from qwantize_vllm.matmul.replay import replay_or_run
from qwantize_vllm.matmul.swizzle import ROWS, SwizzledNvfp4
from qwantize_vllm.matmul.tile_shapes import DecodeShape, choose_normed_shape


class AddedNorm(NamedTuple):
    """x becomes rms_norm(x + residual) * gain, and x + residual is written to `sums`.

    Attributes:
        residual: (M, K) in x's dtype.
        gain: (K,) in x's dtype.
        epsilon: added to the mean square.
        sums: (M, K) in x's dtype, contiguous; receives x + residual.
    """

    residual: torch.Tensor
    gain: torch.Tensor
    epsilon: float
    sums: torch.Tensor


def run_normed(
    x: torch.Tensor,
    norm: AddedNorm,
    weight: SwizzledNvfp4,
    bias: torch.Tensor | None,
    gated: bool,
    multiply: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """y = rms_norm(x + residual) times a swizzled weight, (M, N); gated: silu(first half of y) * second half, (M, N/2).

    x: (M, K) bfloat16 or float16. multiply: the product alone, of a normed x, for numbers of tokens that no kernel does
    all of this for.
    """
    shape = one_kernel(x, norm, weight, gated)
    if shape is not None:
        from qwantize_vllm.matmul.gluon_decode import matmul_decode

        return matmul_decode(x, weight, bias, shape, norm=norm, gated=gated)
    y = multiply(_norm(x, norm))
    return _gate(y) if gated else y


def _norm(x: torch.Tensor, norm: AddedNorm) -> torch.Tensor:
    from qwantize_vllm.matmul.triton_normed import add_norm

    if not x.is_cuda:
        return add_norm(x, norm)
    key = ("norm", x.shape, x.stride(), norm.residual.stride(), x.dtype, norm.epsilon, x.get_device())
    inputs = (x, norm.residual, norm.gain, norm.sums)
    return replay_or_run(key, inputs, lambda launch: add_norm(x, norm, launch))


def _gate(y: torch.Tensor) -> torch.Tensor:
    from qwantize_vllm.matmul.triton_normed import silu_and_mul

    if not y.is_cuda:
        return silu_and_mul(y)
    return replay_or_run(("gate", y.shape, y.dtype, y.get_device()), (y,), lambda launch: silu_and_mul(y, launch))


def one_kernel(x: torch.Tensor, norm: AddedNorm, weight: SwizzledNvfp4, gated: bool) -> DecodeShape | None:
    """The shape of the kernel that does all of it for x (M, K); None where there is none, or it cannot."""
    if not x.is_cuda:
        return None
    shape = choose_normed_shape(capability_major(x.device), x.shape[0], gated, weight.block_size)
    if shape is None or x.dtype != torch.bfloat16 or (gated and weight.shape[0] % (2 * ROWS)):
        return None
    from qwantize_vllm.matmul.backends import why_not_gluon

    inputs = (x, norm.residual, norm.gain[None])
    return shape if all(why_not_gluon(each, weight, shape) is None for each in inputs) else None
