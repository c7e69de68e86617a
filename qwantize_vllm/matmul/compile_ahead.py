"""Kernels compiled while a checkpoint loads.

Triton compiles a kernel where it is first launched, one after the other: for a server that is while it captures its
CUDA graphs, some 20 s on an H200's host. What a weight will need is known as soon as its form is.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from qwantize_vllm.matmul.backends import why_not_gluon
from qwantize_vllm.matmul.compile_process import Request, start_compiling, tell_failure
from qwantize_vllm.matmul.gpu import capability_major
from qwantize_vllm.matmul.normed import AddedNorm, one_kernel
from qwantize_vllm.matmul.swizzle import COLUMNS, SwizzledNvfp4
from qwantize_vllm.matmul.tile_shapes import NORMED_TOKENS, DecodeShape, Shape, TileShape, shapes_for
from qwantize_vllm.matmul.wgmma_shapes import STEPS
from qwantize_vllm.triton_launch import Launch


def compile_ahead(
    weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, normed: bool = False, gated: bool = False
) -> threading.Thread | None:
    """Start to compile what multiplies x, of any number of tokens, by this weight on a GPU, in another process.

    Args:
        weight: on the current device.
        dtype: of x, bfloat16 or float16.
        bias: as the products will have it.
        normed: also what norms x, and, if gated, gates the product (normed.py).

    Returns:
        At once: the thread that waits for the process, or None if there is nothing to compile that was not asked for
        before. What fails says so in the log, and where it is launched.
    """
    if weight.device.type != "cuda":
        return None
    request = Request()
    groups, tiles = weight.words.shape[:2]
    try:
        for shape in shapes_for(capability_major(weight.device), groups, tiles, weight.block_size):
            _compile_shape(weight, dtype, bias, shape, request.launch)
        if normed:
            _compile_normed(weight, dtype, bias, gated, request.launch)
        return start_compiling(request)
    # Whatever it is, it must not end the load: what matters meets the launch too, the rest costs time alone.
    except Exception as error:
        tell_failure(f"{type(error).__name__}: {error}")
        return None


def _compile_normed(
    weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, gated: bool, launch: Launch
) -> None:
    """Where for few tokens one kernel does it all."""
    k = weight.shape[1]
    for tokens in NORMED_TOKENS:
        x = _empty(tokens, k, weight, dtype)
        norm = AddedNorm(x, _empty(1, k, weight, dtype)[0], 1e-6, x)
        shape = one_kernel(x, norm, weight.shape[0], weight.block_size, gated)
        if shape is None:
            continue
        if _is_new(*_kind(weight, dtype, bias, shape), gated):
            from qwantize_vllm.matmul.gluon_decode import matmul_decode

            matmul_decode(x, weight, bias, shape, launch=launch, norm=norm, gated=gated)
        _compile_steps(weight, dtype, gated, launch)


def _compile_steps(weight: SwizzledNvfp4, dtype: torch.dtype, gated: bool, launch: Launch) -> None:
    """What norms and gates the products of more tokens, once: kernels of their own."""
    from qwantize_vllm.matmul.triton_normed import add_norm, silu_and_mul

    n, k = weight.shape
    x = _empty(NORMED_TOKENS[-1] + 1, k, weight, dtype)
    if _is_new("norm", k, dtype, weight.device):
        add_norm(x, AddedNorm(x, x[0], 1e-6, x), launch)
    if gated and _is_new("gate", n, dtype, weight.device):
        silu_and_mul(_empty(len(x), n, weight, dtype), launch)


def _compile_shape(
    weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, shape: Shape, launch: Launch
) -> None:
    if not _is_new(*_kind(weight, dtype, bias, shape)):
        return
    k = weight.shape[1]
    x = _empty(1, k, weight, dtype)
    if isinstance(shape, TileShape):
        from qwantize_vllm.matmul.triton_swizzled import matmul_swizzled

        matmul_swizzled(_empty(shape.tokens, k, weight, dtype), weight, bias, shape, launch=launch)
    elif why_not_gluon(x, weight, shape) is not None:
        return
    elif isinstance(shape, DecodeShape):
        from qwantize_vllm.matmul.gluon_decode import matmul_decode

        matmul_decode(x, weight, bias, shape, launch=launch)
    else:
        from qwantize_vllm.matmul.gluon_wgmma import matmul_wgmma

        for wgmma_shape in STEPS:
            # Cut or not it is one kernel, and an area for sums may not be made yet (partial_sums.py).
            matmul_wgmma(x, weight, bias, wgmma_shape, split=False, launch=launch)


def _kind(weight: SwizzledNvfp4, dtype: torch.dtype, bias: torch.Tensor | None, shape: Shape) -> tuple[Any, ...]:
    """What the kernels are compiled for: Triton asks whether a size is a multiple of 16."""
    n, k = weight.shape
    sizes = (n % 16 == 0, _whole_steps(k, shape), weight.block_size, weight.global_scale.dim())
    return (weight.device, dtype, None if bias is None else bias.dtype, shape, *sizes)


def _whole_steps(k: int, shape: Shape) -> int:
    """What the kernels know of K."""
    return k % (COLUMNS * shape.tiles * shape.warps if isinstance(shape, DecodeShape) else 256)


def _empty(tokens: int, k: int, weight: SwizzledNvfp4, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tokens, k, dtype=dtype, device=weight.device)


_seen: set[tuple[Any, ...]] = set()


def _is_new(*key: Any) -> bool:
    if key in _seen:
        return False
    _seen.add(key)
    return True
