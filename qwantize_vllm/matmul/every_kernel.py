"""Every kernel that multiplies x, of any number of tokens, by the weight of a layer: once each, for little work.

Which kernel serves depends on the number of tokens, and a server meets some numbers first when somebody waits for the
answer. So all kernels are compiled beside the load (compile_ahead.py), and launched before the first request
(warm_up.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Protocol

import torch

from qwantize_vllm.matmul.backends import serves_by_wgmma, why_not_gluon
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.gpu import capability_major
from qwantize_vllm.matmul.grouped_shapes import GROUPED_WGMMA_SHAPES, WGMMA_PAIRS, last_pairs
from qwantize_vllm.matmul.normed import AddedNorm, one_kernel
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.matmul.tile_shapes import NORMED_TOKENS, DecodeShape, Shape, TileShape, shapes_for
from qwantize_vllm.matmul.wgmma_shapes import STEPS
from qwantize_vllm.triton_launch import Launch


class Kernels(Protocol):
    """Those of a layer on a GPU."""

    @property
    def device(self) -> torch.device: ...

    @property
    def kind(self) -> Hashable:
        """Layers of one kind have the same kernels."""

    def launch_all(self, launch: Launch) -> None:
        """Each at least once, on zeros."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearKernels:
    """Those of a linear layer; but for what dequantizes its weight for a dense product.

    Attributes:
        weight: (N, K), on the current device.
        dtype: of x, bfloat16 or float16.
        bias: (N,), as the products will have it, or None.
        normed: also what norms x, and, if gated, gates the product (normed.py).
    """

    weight: SwizzledNvfp4
    dtype: torch.dtype
    bias: torch.Tensor | None
    normed: bool = False
    gated: bool = False

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def kind(self) -> Hashable:
        of_bias = None if self.bias is None else self.bias.dtype
        of_weight = (self.weight.shape, self.weight.block_size, self.weight.global_scale.dim())
        return (self.device, self.dtype, of_bias, *of_weight, self.normed, self.gated)

    def launch_all(self, launch: Launch) -> None:
        self._launch_products(launch)
        if self.normed:
            self._launch_normed(launch)

    def _launch_products(self, launch: Launch) -> None:
        major, (groups, tiles) = capability_major(self.device), self.weight.words.shape[:2]
        x = self._zeros(1, self.weight.shape[1])
        shapes = shapes_for(major, groups, tiles, self.weight.block_size)
        served = [shape for shape in shapes if why_not_gluon(x, self.weight, shape) is None]
        if len(served) < len(shapes):
            served += shapes_for(major, groups, tiles, self.weight.block_size, gluon=False)
        for shape in dict.fromkeys(served):
            _launch_shape(x, self.weight, self.bias, shape, launch)

    def _launch_normed(self, launch: Launch) -> None:
        """Where for few tokens one kernel does it all; with more of them, kernels of their own do before and after."""
        n, k = self.weight.shape
        fused = [tokens for tokens in NORMED_TOKENS if self._launch_fused(tokens, launch)]
        if not fused:
            return
        from qwantize_vllm.matmul.triton_normed import add_norm, silu_and_mul

        tokens = NORMED_TOKENS[-1] + 1
        add_norm(self._zeros(tokens, k), self._norm(tokens), launch)
        if self.gated:
            silu_and_mul(self._zeros(tokens, n), launch)

    def _launch_fused(self, tokens: int, launch: Launch) -> bool:
        """Whether there is one kernel for so many tokens."""
        (n, k), norm = self.weight.shape, self._norm(tokens)
        x = self._zeros(tokens, k)
        shape = one_kernel(x, norm, n, self.weight.block_size, self.gated)
        if shape is None:
            return False
        from qwantize_vllm.matmul.gluon_decode import matmul_decode

        matmul_decode(x, self.weight, self.bias, shape, launch=launch, norm=norm, gated=self.gated)
        return True

    def _norm(self, tokens: int) -> AddedNorm:
        residual = self._zeros(tokens, self.weight.shape[1])
        return AddedNorm(residual, residual[0], 1e-6, torch.empty_like(residual))

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertKernels:
    """Those of the experts of a layer.

    Attributes:
        w13: of gate and up, w2: of down.
        top_k: experts of a token.
        dtype: of x, bfloat16 or float16.
        activation: one of ACTIVATIONS.
    """

    w13: SwizzledExperts
    w2: SwizzledExperts
    top_k: int
    dtype: torch.dtype
    activation: str

    @property
    def device(self) -> torch.device:
        return self.w13.words.device

    @property
    def kind(self) -> Hashable:
        experts, members = self.w13.global_scales.shape
        of_weights = (experts, self.w13.total, members, self.w13.shape, self.w2.shape, self.w13.block_size)
        return (self.device, self.dtype, self.top_k, self.activation, *of_weights)

    def launch_all(self, launch: Launch) -> None:
        from qwantize_vllm.matmul.triton_grouped import experts_swizzled, tokens_of_each_kind

        experts, total = len(self.w13.global_scales), self.w13.total
        by_wgmma = serves_by_wgmma(self.device, self.w13, self.w2)
        # More pairs are served by the other kernel, or in the shapes of these.
        last = last_pairs(capability_major(self.device))
        pairs = (WGMMA_PAIRS * experts - 1) * total // experts if by_wgmma else int(last * total) + self.top_k
        counts = tokens_of_each_kind(self.w13, self.w2, self.top_k, pairs // self.top_k)
        for tokens in counts:
            experts_swizzled(*self._routed(tokens), launch=launch)
        if not by_wgmma:
            # Of still more tokens K is not cut into slices.
            experts_swizzled(*self._routed(counts[-1]), split=False, launch=launch)
        if total > experts:
            from qwantize_vllm.matmul.triton_local_ids import map_ids

            ids = torch.zeros(1, self.top_k, dtype=torch.int32, device=self.device)
            map_ids(ids, torch.zeros(total, dtype=torch.int32, device=self.device), launch)
        if by_wgmma:
            from qwantize_vllm.matmul.gluon_grouped import experts_wgmma

            for shape in GROUPED_WGMMA_SHAPES:
                experts_wgmma(*self._routed(1), (shape, shape), launch=launch)

    def _routed(
        self, tokens: int
    ) -> tuple[torch.Tensor, SwizzledExperts, SwizzledExperts, torch.Tensor, torch.Tensor, str]:
        """Tokens that all go to the first expert."""
        x = torch.zeros(tokens, self.w13.shape[1], dtype=self.dtype, device=self.device)
        ids = torch.zeros(tokens, self.top_k, dtype=torch.int32, device=self.device)
        return x, self.w13, self.w2, ids.float(), ids, self.activation


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
