"""The one door of the matmul."""

from __future__ import annotations

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.backends import BACKENDS, SWIZZLED_BACKENDS
from qwantize_vllm.matmul.op import matmul_op, matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4


def matmul_nvfp4(
    x: torch.Tensor, q: Nvfp4Tensor | SwizzledNvfp4, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """x . W' + bias from the codes and scales of W, without keeping W.

    Products with one swizzled weight must not overlap on two streams: they share scratch that it holds (`arrived`).
    A CUDA graph of such products, whatever their weights, uses scratch of the stream that captured it: while it runs,
    neither another graph captured there nor a product on that stream may run.

    Args:
        x: (..., K) bfloat16, float16 or float32; any strides, any number of tokens, none included.
        q: unbatched, of shape (N, K), on x's device. What `swizzle` makes of it is what a GPU multiplies fastest.
        bias: (N,), float16, bfloat16, float32 or float64; any stride.
        backend: "auto" chooses by device and number of tokens; "reference", "cpu", "cpu_fused",
            "dequantize" and "fused" are those of `matmul/backends.py`. For a swizzled weight they are
            "swizzled", "unswizzled" and "batch_invariant": the bits of a row then do not depend on the others.

    Returns:
        (..., N) in x's dtype. Products accumulate in float32.

    Raises:
        ValueError: shapes, devices or dtypes do not fit; an unknown backend, or one that cannot
            multiply x (says why).
    """
    if isinstance(q, Nvfp4Tensor) and q.codes.dim() != 2:
        raise ValueError(f"matmul_nvfp4 takes an unbatched (N, K) weight, got {tuple(q.shape)}; index it first")
    n, k = q.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}) for a weight {(n, k)}, got {tuple(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"x is on {x.device}, the weight on {q.device}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.device != x.device):
        raise ValueError(f"bias must be ({n},) on {x.device}, got {tuple(bias.shape)} on {bias.device}")
    allowed = SWIZZLED_BACKENDS if isinstance(q, SwizzledNvfp4) else ("auto", *BACKENDS)
    if backend not in allowed:
        raise ValueError(f"backend must be one of {allowed}, got {backend!r}")
    if isinstance(q, SwizzledNvfp4):
        return matmul_swizzled_op(x, q.words, q.scales, q.global_scale, q.arrived, bias, n, q.block_size, backend)
    return matmul_op(x, q.codes, q.block_scales, q.global_scale, bias, q.block_size, backend)
