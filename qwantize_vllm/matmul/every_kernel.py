"""Every kernel that multiplies x, of any number of tokens, by a weight: once each, for little work or none.

Which kernel serves depends on the number of tokens, and a server meets some numbers first when somebody waits for the
answer. So all kernels are compiled beside the load (compile_ahead.py), and launched before the first request
(warm_up.py).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from qwantize_vllm.matmul.backends import serves_by_wgmma, why_not_gluon
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.gpu import capability_major
from qwantize_vllm.matmul.grouped_shapes import WGMMA_PAIRS, grouped_wgmma_shapes, last_pairs
from qwantize_vllm.matmul.normed import AddedNorm, one_kernel
from qwantize_vllm.matmul.swizzle import COLUMNS, SwizzledNvfp4
from qwantize_vllm.matmul.tile_shapes import NORMED_TOKENS, DecodeShape, Shape, TileShape, shapes_for
from qwantize_vllm.matmul.wgmma_shapes import STEPS
from qwantize_vllm.triton_launch import Launch

_Routed = tuple[torch.Tensor, SwizzledExperts, SwizzledExperts, torch.Tensor, torch.Tensor, str]


class Seen(set[Hashable]):
    """For what has been launched: all that kernels are compiled for."""

    def is_new(self, *key: Hashable) -> bool:
        """The first time."""
        if key in self:
            return False
        self.add(key)
        return True


def launch_every(
    weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, launch: Launch, seen: Seen
) -> None:
    """Those of a weight (N, K) on a GPU that are new; but for what dequantizes it for a dense product.

    dtype: of x, bfloat16 or float16. bias: (N,) as the products will have it, or None.
    """
    major, (groups, tiles) = capability_major(weight.device), weight.words.shape[:2]
    x = torch.zeros(1, weight.shape[1], dtype=dtype, device=weight.device)
    shapes = shapes_for(major, groups, tiles, weight.block_size)
    served = [shape for shape in shapes if why_not_gluon(x, weight, shape) is None]
    if len(served) < len(shapes):
        served = list(dict.fromkeys([*served, *shapes_for(major, groups, tiles, weight.block_size, gluon=False)]))
    for shape in served:
        if seen.is_new(*_kind_of(weight, dtype, bias, shape)):
            _launch_shape(x, weight, bias, shape, launch)


def launch_every_normed(
    weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, gated: bool, launch: Launch, seen: Seen
) -> None:
    """What norms x and, if gated, gates the product (normed.py), where for few tokens one kernel does it all; with more
    of them kernels of their own do before and after those of `launch_every`."""
    for tokens in NORMED_TOKENS:
        norm = _norm(tokens, weight, dtype)
        x = torch.zeros_like(norm.residual)
        shape = one_kernel(x, norm, weight.shape[0], weight.block_size, gated)
        if shape is None:
            continue
        if seen.is_new(*_kind_of(weight, dtype, bias, shape), "gated" if gated else "normed"):
            from qwantize_vllm.matmul.gluon_decode import matmul_decode

            matmul_decode(x, weight, bias, shape, launch=launch, norm=norm, gated=gated)
        _launch_steps(weight, dtype, gated, launch, seen)


def _launch_steps(weight: SwizzledNvfp4, dtype: torch.dtype, gated: bool, launch: Launch, seen: Seen) -> None:
    from qwantize_vllm.matmul.triton_normed import add_norm, silu_and_mul

    (n, k), tokens = weight.shape, NORMED_TOKENS[-1] + 1
    if seen.is_new("norm", k, dtype, weight.device):
        norm = _norm(tokens, weight, dtype)
        add_norm(torch.zeros_like(norm.residual), norm, launch)
    if gated and seen.is_new("gate", n, dtype, weight.device):
        silu_and_mul(torch.zeros(tokens, n, dtype=dtype, device=weight.device), launch)


def _norm(tokens: int, weight: SwizzledNvfp4, dtype: torch.dtype) -> AddedNorm:
    residual = torch.zeros(tokens, weight.shape[1], dtype=dtype, device=weight.device)
    return AddedNorm(residual, residual[0], 1e-6, torch.empty_like(residual))


def launch_every_of_experts(
    w13: SwizzledExperts,
    w2: SwizzledExperts,
    top_k: int,
    dtype: torch.dtype,
    activation: str,
    launch: Launch,
    seen: Seen,
) -> None:
    """Those of the experts of a layer on a GPU, if they are new; top_k: experts of a token."""
    device, experts = w13.words.device, w13.words.shape[0]
    sizes = (w13.shape, w2.shape, experts, w13.block_size, w13.global_scales.shape[1])
    if not seen.is_new(device, dtype, top_k, activation, *sizes):
        return
    from qwantize_vllm.matmul.triton_grouped import experts_swizzled, tokens_of_each_kind

    def routed(tokens: int) -> _Routed:
        """Tokens that all go to the first expert."""
        x = torch.zeros(tokens, w13.shape[1], dtype=dtype, device=device)
        ids = torch.zeros(tokens, top_k, dtype=torch.int32, device=device)
        return x, w13, w2, ids.float(), ids, activation

    by_wgmma = serves_by_wgmma(device, w13, w2)
    # More pairs are served by the other kernel, or as these are.
    pairs = WGMMA_PAIRS * experts - 1 if by_wgmma else int(last_pairs(capability_major(device)) * experts) + top_k
    for tokens in tokens_of_each_kind(w13, w2, top_k, pairs // top_k):
        experts_swizzled(*routed(tokens), launch=launch)
    if by_wgmma:
        from qwantize_vllm.matmul.gluon_grouped import experts_wgmma

        for shape in grouped_wgmma_shapes():
            experts_wgmma(*routed(1), shape, launch=launch)


def _launch_shape(
    x: torch.Tensor, weight: SwizzledNvfp4, bias: torch.Tensor | None, shape: Shape, launch: Launch
) -> None:
    """x: (1, K)."""
    if isinstance(shape, TileShape):
        from qwantize_vllm.matmul.triton_swizzled import matmul_swizzled

        matmul_swizzled(x.repeat(shape.tokens, 1), weight, bias, shape, launch=launch)
    elif isinstance(shape, DecodeShape):
        from qwantize_vllm.matmul.gluon_decode import matmul_decode

        matmul_decode(x, weight, bias, shape, launch=launch)
    else:
        from qwantize_vllm.matmul.gluon_wgmma import matmul_wgmma

        for wgmma_shape in STEPS:
            # Cut or not it is one kernel, and an area for sums may not be made yet (partial_sums.py).
            matmul_wgmma(x, weight, bias, wgmma_shape, split=False, launch=launch)


def _kind_of(
    weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, shape: Shape
) -> tuple[Hashable, ...]:
    """What kernels are compiled for: Triton asks whether a size is a multiple of 16."""
    n, k = weight.shape
    sizes = (n % 16 == 0, _whole_steps(k, shape), weight.block_size, weight.global_scale.dim())
    return (weight.device, dtype, None if bias is None else bias.dtype, shape, *sizes)


def _whole_steps(k: int, shape: Shape) -> int:
    """What the kernels know of K."""
    return k % (COLUMNS * shape.tiles * shape.warps if isinstance(shape, DecodeShape) else 256)
