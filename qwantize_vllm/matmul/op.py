"""The matmul as one custom op: torch.compile and CUDA graphs take it whole, whichever backend runs inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.backends import BACKENDS, choose_backend, run_experts, run_swizzled
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.experts_cpu import experts_one_by_one, members_of
from qwantize_vllm.matmul.normed import AddedNorm, gate_alone, norm_alone, one_kernel
from qwantize_vllm.matmul.replay import replay_or_run
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.matmul.warm_up import warm_up
from qwantize_vllm.triton_launch import Launch, launch_now


def _in_a_row(bias: torch.Tensor | None) -> torch.Tensor | None:
    """As kernels read it, which are told of no strides: a bias that is contiguous is not copied."""
    return None if bias is None else bias.contiguous()


@torch.library.custom_op("qwantize::matmul_nvfp4", mutates_args=())
def matmul_op(
    x: torch.Tensor,
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: int,
    backend: str,
) -> torch.Tensor:
    """x (..., K) times the NVFP4 weight (N, K) -> (..., N); see `matmul_nvfp4`, which checks the arguments."""
    q = Nvfp4Tensor(codes, block_scales, global_scale, block_size)
    flat, bias = x.reshape(-1, x.shape[-1]), _in_a_row(bias)
    name = choose_backend(flat) if backend == "auto" else backend
    if reason := BACKENDS[name].why_not(flat):
        raise ValueError(f"backend {name!r} {reason}")
    return BACKENDS[name].run(flat, q, bias).view(*x.shape[:-1], q.shape[0])


@matmul_op.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, *rest: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _matmul_swizzled(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    arrived: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    block_size: int,
    backend: str,
) -> torch.Tensor:
    """x (..., K) times the swizzled NVFP4 weight (N, K) -> (..., N); see `matmul_nvfp4`, which checks the arguments."""
    warm_up()
    flat, bias = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), _in_a_row(bias)
    if flat.stride(1) != 1:
        flat = flat.contiguous()  # here, for what a launch is given besides these tensors would be taken for scratch

    def run(launch: Launch) -> torch.Tensor:
        weight = SwizzledNvfp4(words, scales, global_scale, arrived, (n, x.shape[-1]), block_size)
        return run_swizzled(flat, weight, bias, backend, launch)

    if flat.is_cuda:
        inputs = (flat, words, scales, global_scale, arrived, bias)
        # The rest of a weight is known: n, K and the block size say it, and who made the weight has checked it.
        sizes = (words.nbytes, scales.nbytes, global_scale.nbytes, arrived.nbytes)
        kind = (flat.shape, flat.stride(), flat.dtype, flat.get_device(), None if bias is None else bias.dtype)
        y = replay_or_run((n, block_size, backend, kind, sizes), inputs, run)
    else:
        y = run(launch_now)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _fake_matmul_swizzled(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    arrived: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    *rest: object,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _normed_matmul_swizzled(
    x: torch.Tensor,
    residual: torch.Tensor,
    gain: torch.Tensor,
    epsilon: float,
    words: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    arrived: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    block_size: int,
    backend: str,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and x + residual (M, K), of x (M, K); y is `_matmul_swizzled` of rms_norm(x + residual) * gain, (M, n), or if
    gated silu(its first half) * its second half, (M, n/2). All in the dtype of x, residual (M, K) and gain (K,)."""
    norm = AddedNorm(residual, gain, epsilon, torch.empty(x.shape, dtype=x.dtype, device=x.device))
    tensors = (words, scales, global_scale, arrived)
    warm_up()
    if (shape := one_kernel(x, norm, n, block_size, gated)) is not None:
        from qwantize_vllm.matmul.gluon_decode import matmul_decode

        weight = SwizzledNvfp4(*tensors, (n, x.shape[1]), block_size)
        return matmul_decode(x, weight, _in_a_row(bias), shape, norm=norm, gated=gated), norm.sums
    y = _matmul_swizzled(norm_alone(x, norm), *tensors, bias, n, block_size, backend)
    return gate_alone(y) if gated else y, norm.sums


def _fake_normed_matmul_swizzled(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, n, _, _, gated = rest
    return x.new_empty(x.shape[0], n // 2 if gated else n), x.new_empty(x.shape)


def _define(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An op of the library `qwantize`; as torch.library.custom_op, whose wrappers take longer than the launch."""
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(f"qwantize::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"qwantize::{name}", "default", function)
    torch.library.register_fake(f"qwantize::{name}", fake)
    return getattr(torch.ops.qwantize, name).default


# `arrived` is not declared as mutated: it is scratch, zeros before and after.
matmul_swizzled_op = _define("matmul_swizzled", _matmul_swizzled, _fake_matmul_swizzled)
normed_matmul_swizzled_op = _define("normed_matmul_swizzled", _normed_matmul_swizzled, _fake_normed_matmul_swizzled)


@torch.library.custom_op("qwantize::experts", mutates_args=())
def experts_op(
    x: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    block_size: int,
    backend: str,
) -> torch.Tensor:
    """x (M, K) through the experts that each token is routed to -> (M, N), from plain codes.

    w13, w2: codes uint8 (E, rows, K/2), block scales (E, rows, K/block_size), global scales (E, members). See
    `experts_one_by_one`; backend: of backends.py, or "auto".

    Raises:
        ValueError: a CUDA graph is being captured.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"experts with backend {backend!r} cannot be captured in a CUDA graph: set --enforce-eager")

    def multiply(inputs: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return matmul_op(inputs, q.codes, q.block_scales, q.global_scale, bias, q.block_size, backend)

    first, second = (members_of(codes, scales, global_scales, block_size) for codes, scales, global_scales in (w13, w2))
    return experts_one_by_one(x, first, second[0], topk_weights, topk_ids, activation, multiply)


@experts_op.register_fake
def _(x: torch.Tensor, w13: list[torch.Tensor], w2: list[torch.Tensor], *rest: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], w2[0].shape[1])


def _experts_swizzled(
    x: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    intermediate: int,
    out: int,
    block_size: int,
    total: int,
    backend: str,
) -> torch.Tensor:
    """As `experts_op`, from words, scales and global scales of SwizzledExperts (2 * intermediate, K) and
    (out, intermediate), and what else they hold; backend: see `run_experts`."""
    first = SwizzledExperts(w13[0], w13[1], w13[2], (2 * intermediate, x.shape[1]), block_size, True, total)
    second = SwizzledExperts(w2[0], w2[1], w2[2], (out, intermediate), block_size, False, total)
    warm_up()
    return run_experts(x, first, second, topk_weights, topk_ids, activation, backend)


def _fake_experts_swizzled(
    x: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    intermediate: int,
    out: int,
    *rest: object,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out)


experts_swizzled_op = _define("experts_swizzled", _experts_swizzled, _fake_experts_swizzled)
