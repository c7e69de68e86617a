"""A product with what stands before it and after it in most models: the RMS norm of a sum, and a gate.

At one or two tokens each of these is a kernel of some 2 us for numbers that would fit into one register a thread; there
the product's kernel does them (gluon_normed.py). With more tokens they are kernels of their own, as they were.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwantize_vllm.matmul.backends import tell_once, why_no_gluon
from qwantize_vllm.matmul.gpu import capability_major
from qwantize_vllm.matmul.replay import replay_or_run
from qwantize_vllm.matmul.swizzle import ROWS
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


def one_kernel(x: torch.Tensor, norm: AddedNorm, n: int, block_size: int, gated: bool) -> DecodeShape | None:
    """The shape of the kernel that does all of it, for x (M, K) and a swizzled weight (n, K) with such blocks; None
    where there is none, or it cannot. gated: the result is silu(its first half) * its second half."""
    if not x.is_cuda:
        return None
    shape = choose_normed_shape(capability_major(x.device), x.shape[0], gated, block_size)
    if shape is None or x.dtype != torch.bfloat16 or (gated and n % (2 * ROWS)):
        return None
    reason = why_no_gluon() or _why_not_in_pairs(x, norm)
    if reason:
        tell_once(f"the kernel that norms, multiplies and gates {reason}; kernels one after another take its place")
        return None
    return shape


def _why_not_in_pairs(x: torch.Tensor, norm: AddedNorm) -> str | None:
    from qwantize_vllm.matmul.gluon_decode import why_not_decode

    return next(filter(None, map(why_not_decode, (x, norm.residual, norm.gain[None]))), None)


def norm_alone(x: torch.Tensor, norm: AddedNorm) -> torch.Tensor:
    """rms_norm(x + residual) * gain, (M, K), by a kernel of its own; writes norm.sums."""
    from qwantize_vllm.matmul.triton_normed import add_norm

    if not x.is_cuda:
        return add_norm(x, norm)
    inputs = (x, norm.residual, norm.gain, norm.sums)
    kinds = tuple(each.dtype for each in inputs)
    key = ("norm", x.shape, x.stride(), norm.residual.stride(), kinds, norm.epsilon, x.get_device())
    return replay_or_run(key, inputs, lambda launch: add_norm(x, norm, launch))


def gate_alone(y: torch.Tensor) -> torch.Tensor:
    """silu(y[:, :N]) * y[:, N:] of y (M, 2 * N), contiguous, by a kernel of its own."""
    from qwantize_vllm.matmul.triton_normed import silu_and_mul

    if not y.is_cuda:
        return silu_and_mul(y)
    return replay_or_run(("gate", y.shape, y.dtype, y.get_device()), (y,), lambda launch: silu_and_mul(y, launch))
